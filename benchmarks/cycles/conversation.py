"""Several turns on one cache, which somebody changes in between, and decoding loops by hand."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks.cycles.caches import EDITS, chosen_edit, given_cache, states_of
from benchmarks.cycles.generation import answer, modes
from benchmarks.cycles.inputs import MADE, batch_of
from benchmarks.cycles.state import Cycle, Pair

NEW = 3
"""Tokens of an answer."""
READ = 5
"""Tokens that an encoder reads."""


def conversation(cycle: Cycle, pair: Pair, rng: Random) -> None:
    """Turns of ``generate``: each is the whole conversation so far, on the cache of the turn before."""
    batch, turns = rng.choice(cycle.habits.shapes)["batch"], [rng.choice([1, 4]) for _ in range(rng.choice([2, 3]))]
    cache, mode = rng.choice(["its own", *MADE, *MADE]), modes(rng)
    between = [(chosen_edit(rng), rng.choice([None, None, None, "reset Dynamo", "compile"])) for _ in turns]
    seed, compile_seed = rng.randrange(10**6), rng.randrange(10**6)
    rough = next(pair.model.parameters()).dtype.itemsize < 4
    cycle.say(f"  {cache} {mode.__name__} batch={batch} turns={turns} between={between}")
    if any(edit == "unseen" for edit, _ in between):
        cycle.watch.unseen_writes = True

    refusals = cycle.refusals

    def run(model: Any) -> dict[str, Any]:
        length = sum(turns) + NEW * len(turns) + 1
        read = READ if pair.kind == "seq2seq" else None
        held = None if cache == "its own" else given_cache(model, cache, length, read)
        found: dict[str, Any] = {}
        said = _start(model, pair.kind, batch, seed)
        for number, (turn, (edit, other)) in enumerate(zip(turns, between, strict=True)):
            said = _with_words(said, pair.kind, turn, seed + number)
            with mode():
                one = answer(model, said, max_new_tokens=NEW, min_new_tokens=NEW, past_key_values=held)
                held, tokens = one.pop("cache"), one["tokens"]
                found |= {f"{number}.{name}": value for name, value in {**one, **states_of(held)}.items()}
                said = _edited(held, _after(said, tokens, pair.kind), edit)
            if model is pair.model and other is not None:
                _between(cycle, pair, other, Random(compile_seed), cycle.refusals > refusals)
        return found

    cycle.compare(pair, run, rough=rough)


def _start(model: Any, kind: str, batch: int, seed: int) -> dict[str, Tensor]:
    """Before the first word: nothing, or what the encoder reads."""
    if kind == "causal":
        return {"input_ids": torch.zeros(batch, 0, dtype=torch.long)}
    inputs = batch_of(model, kind, batch=batch, length=READ, padded=False, seed=seed)
    return {**inputs, "decoder_input_ids": torch.ones(batch, 1, dtype=torch.long)}


def _spoken(kind: str) -> str:
    return "input_ids" if kind == "causal" else "decoder_input_ids"


def _with_words(said: dict[str, Tensor], kind: str, count: int, seed: int) -> dict[str, Tensor]:
    before = said[_spoken(kind)]
    words = torch.randint(5, 250, (len(before), count), generator=torch.Generator().manual_seed(seed))
    return _after(said, torch.cat([before, words], 1), kind)


def _after(said: dict[str, Tensor], tokens: Tensor, kind: str) -> dict[str, Tensor]:
    masks = {"attention_mask": torch.ones_like(tokens)} if kind == "causal" else {}
    return {**said, **masks, _spoken(kind): tokens}


def _edited(cache: Any, said: dict[str, Tensor], edit: str | None) -> dict[str, Tensor]:
    """Change the cache; what was said is cut as it is."""
    if edit is None:
        return said
    EDITS[edit](cache)
    kept = {"cropped": -2, "reset": 0}.get(edit)
    spoken = {"attention_mask", "input_ids"} if "decoder_input_ids" not in said else {"decoder_input_ids"}
    return {name: tensor[:, :kept] if name in spoken else tensor for name, tensor in said.items()}


def _between(cycle: Cycle, pair: Pair, what: str, rng: Random, refused: bool) -> None:
    """``refused``: a budget has been too small for this conversation, and stays what it is."""
    if what == "compile":
        cycle.compile(pair, rng, pair.budget_bytes if refused else None)
    else:
        torch._dynamo.reset()


def by_hand(cycle: Cycle, pair: Pair, rng: Random) -> None:
    """A loop of forwards with a cache, one token each; a mask that grows, if the first prompt was padded."""
    shape, steps, cache, inference = (
        rng.choice(cycle.habits.shapes),
        rng.choice([2, 4]),
        rng.choice(MADE),
        rng.random() < 0.2,
    )
    batch, length = shape["batch"], shape["length"]
    cycle.say(f"  {cache} {shape} steps={steps} inference={inference}")
    inputs = batch_of(pair.model, "causal", **shape, seed=rng.randrange(10**6))

    def run(model: Any) -> dict[str, Any]:
        held = given_cache(model, cache, length + steps, None)
        found: dict[str, Any] = {}
        tokens, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.inference_mode() if inference else torch.no_grad():
            for step in range(steps):
                output = model(input_ids=tokens, attention_mask=mask, past_key_values=held, use_cache=True)
                tokens = output.logits[:, -1:].argmax(-1)
                mask = torch.cat([mask, torch.ones(batch, 1, dtype=mask.dtype)], 1)
                found[f"logits.{step}"] = output.logits
        return {**found, **states_of(held)}

    cycle.compare(pair, run)
