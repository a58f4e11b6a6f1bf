"""Ways to use a model: forwards and generations, alone, in threads, interrupted, with caches that come and go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from random import Random
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from benchmarks.cycles.caches import given_cache
from benchmarks.cycles.inputs import MADE, batch_of, forward_inputs
from benchmarks.cycles.state import Cycle, Pair
from benchmarks.one_architecture import ENCODED
from hetegen_compile.accelerators import EmulatedAccelerator
from hetegen_compile.errors import BudgetError
from hetegen_compile.runtime import live_runtimes

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, too": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"num_beams": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "prompt look-up": {"prompt_lookup_num_tokens": 2},
    "an assistant": {},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}
ALONE = ("prompt look-up", "an assistant")
"""Ways that take one prompt."""


class AtLength(StoppingCriteria):
    """Stop when a sequence is as long as that."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: Tensor, scores: Any, **rest: Any) -> Tensor:
        """One answer a sequence."""
        return torch.full((len(input_ids),), input_ids.shape[1] >= self._length)


class Kept(BaseStreamer):
    """A streamer that keeps what comes."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        """Tokens of one step."""
        self.pieces.append(value.flatten().clone())

    def end(self) -> None:
        """Nothing more comes."""


def modes(rng: Random) -> Callable[[], AbstractContextManager[Any]]:
    """Inference mode now and then."""
    return rng.choice([*[nullcontext] * 4, torch.inference_mode])


def answer(model: Any, inputs: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    """``generate`` on copies of the inputs: logits of each step and tokens."""
    found = model.generate(
        **{name: tensor.clone() for name, tensor in inputs.items()},
        **{"do_sample": False, **options}, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return {"logits": torch.stack(found.logits), "tokens": found.sequences, "cache": found.get("past_key_values")}


def generate(cycle: Cycle, pair: Pair, rng: Random) -> None:
    """One generation, or the same three times: then nothing but what is streamed moves in the last."""
    way = rng.choice(sorted(WAYS))
    shape = {**rng.choice(cycle.habits.shapes), **({"batch": 1} if way in ALONE else {}), "seed": rng.randrange(10**6)}
    cache, new, mode = rng.choice(cycle.habits.caches), rng.choice([4, 4, 6]), modes(rng)
    stops, streams, times = rng.random() < 0.3, shape["batch"] == 1 and rng.random() < 0.3, rng.choice([1, 1, 1, 3])
    low = next(pair.model.parameters()).dtype.itemsize < 4
    cycle.say(f"  {way} {shape} cache={cache} new={new} {mode.__name__} stops={stops} streams={streams} x{times}")
    inputs = batch_of(pair.model, pair.kind, **shape)
    spoken = 1 if pair.kind in ENCODED else inputs["input_ids"].shape[1]

    def run(model: Any) -> dict[str, Any]:
        options = {**WAYS[way], **_lengths(new, stops, spoken), **_cache_options(model, cache, new, inputs)}
        streamer = Kept() if streams and "num_beams" not in options else None
        if way == "an assistant":
            options["assistant_model"] = _assistant(cycle, pair)
        with mode():
            found = answer(model, inputs, streamer=streamer, **options)
        del found["cache"]
        return {**found, "streamed": torch.cat(streamer.pieces) if streamer else None}

    for turn in range(times):
        if not cycle.compare(pair, run, unchanged=turn == 2, rough=low or cache == "quantized"):
            return


def _lengths(new: int, stops: bool, spoken: int) -> dict[str, Any]:
    """``new`` tokens behind those that the decoder begins with, by number or by a criterion."""
    if not stops:
        return {"max_new_tokens": new, "min_new_tokens": new}
    return {"max_new_tokens": new + 2, "stopping_criteria": [AtLength(spoken + new)]}


def _cache_options(model: Any, cache: str | None, new: int, inputs: dict[str, Tensor]) -> dict[str, Any]:
    if cache in MADE:
        read = inputs["input_ids"].shape[1] if "input_ids" in inputs else None
        return {"past_key_values": given_cache(model, cache, new + (read or 0) + 3, read)}
    if cache == "quantized":
        return {"cache_implementation": cache, "cache_config": {"backend": "fp8"}}
    return {} if cache is None else {"cache_implementation": cache}


def _assistant(cycle: Cycle, pair: Pair) -> Any:
    """The twin of another model of the same vocabulary, if there is one, or of this one."""
    return next((other.eager for other in cycle.pairs if other is not pair and other.kind == pair.kind), pair.eager)


def forward(cycle: Cycle, pair: Pair, rng: Random) -> None:
    """A forward without a cache, now and then with all hidden states."""
    shape = rng.choice(cycle.habits.shapes)
    inputs = forward_inputs(pair.model, pair.kind, **shape, seed=rng.randrange(10**6))
    mode, hidden = rng.choice([*[torch.no_grad] * 3, torch.inference_mode]), rng.random() < 0.2
    without = {} if pair.kind == "masked" else {"use_cache": False}
    cycle.say(f"  {shape} {mode.__name__} hidden={hidden}")

    def run(model: Any) -> dict[str, Any]:
        with mode():
            found = model(**{k: v.clone() for k, v in inputs.items()}, **without, output_hidden_states=hidden)
        return {"logits": found.logits, **_named(found, "hidden_states"), **_named(found, "decoder_hidden_states")}

    cycle.compare(pair, run)


def _named(found: Any, field: str) -> dict[str, Any]:
    return {f"{field}.{i}": each for i, each in enumerate(found.get(field) or ())}


def trained(cycle: Cycle, pair: Pair, rng: Random) -> None:
    """A forward in training mode (dropout draws from the generator as eager does), then evaluation again."""
    for model in pair.both:
        model.train()
    try:
        forward(cycle, pair, rng)
    finally:
        for model in pair.both:
            model.eval()


def interrupted(cycle: Cycle, pair: Pair, rng: Random) -> None:
    """Ctrl-C in the middle of a step; what follows must not notice."""
    inputs = forward_inputs(pair.model, pair.kind, batch=1, length=5, padded=False, seed=1)
    left = rng.choice([1, 2, 5, 11, 30, 60])
    cycle.say(f"  at operation {left}")
    accelerators = [runtime.accelerator for runtime in live_runtimes()]
    engines = [each._engine for each in accelerators if isinstance(each, EmulatedAccelerator)]
    del accelerators

    def interrupt(submit: Any) -> Any:
        def submitted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return submit(*args, **kwargs)

        return submitted

    for engine in engines[:1]:
        with mock.patch.object(engine, "submit", interrupt(engine.submit)), torch.no_grad():
            try:
                pair.model(**inputs)
            except (KeyboardInterrupt, BudgetError) as error:
                cycle.say(f"  {type(error).__name__}")
    forward(cycle, pair, rng)


def in_threads(cycle: Cycle, pair: Pair, rng: Random) -> None:
    """Two threads call the same model."""
    inputs = [forward_inputs(pair.model, pair.kind, batch=1, length=4, padded=False, seed=seed) for seed in range(2)]

    def run(model: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def work(number: int) -> None:
            try:
                with torch.no_grad():
                    found[f"logits.{number}"] = model(**inputs[number]).logits
            except BaseException as error:
                found[f"logits.{number}"] = error

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for each in found.values():
            if isinstance(each, BaseException):
                raise each
        return dict(sorted(found.items()))

    cycle.compare(pair, run)
