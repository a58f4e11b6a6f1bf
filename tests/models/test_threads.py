"""``generate()`` in threads, as a server or a chat window calls it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from tests.models.architectures import VOCABULARY, prompts, tiny_model
from tests.models.harness import RecordingBackend, compiled_like_eager, emulated, half_the_weights

TOKENS = 5
LONGEST_S = 120


def _generate(model: PreTrainedModel, tokens: Tensor, **options: Any) -> Tensor:
    lengths = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    found: Tensor = model.generate(tokens, **lengths, **options)  # type: ignore[operator]
    return found


class _Pieces(BaseStreamer):
    """Hands tokens over to another thread as they come, as ``TextIteratorStreamer`` does with text."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Tensor | None] = SimpleQueue()

    def put(self, value: Tensor) -> None:
        self._queue.put(value.clone())

    def end(self) -> None:
        self._queue.put(None)

    def all(self) -> list[Tensor]:
        return list(iter(lambda: self._queue.get(timeout=LONGEST_S), None))


def test_an_answer_streamed_to_another_thread() -> None:
    model, tokens = tiny_model("llama", layers=1), prompts(1)["input_ids"]

    def run() -> list[Tensor]:
        pieces = _Pieces()
        thread = threading.Thread(target=_generate, args=(model, tokens), kwargs={"streamer": pieces})
        thread.start()
        found = pieces.all()
        thread.join(LONGEST_S)
        return found

    found = compiled_like_eager(model, run, options=emulated(gpu_memory=half_the_weights(model) * 13 // 10))
    assert len(found.eager) == 1 + TOKENS


def _at_once(calls: Sequence[Callable[[], Tensor]]) -> list[Tensor | BaseException]:
    """Results of calls that start in threads at the same time."""
    found: list[Any] = [None] * len(calls)
    together = threading.Barrier(len(calls))

    def work(i: int) -> None:
        together.wait(LONGEST_S)
        try:
            found[i] = calls[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONGEST_S)
    return found


def _assert_same(found: Sequence[Tensor | BaseException], expected: Sequence[Tensor]) -> None:
    for one, right in zip(found, expected, strict=True):
        assert isinstance(one, Tensor), one
        assert torch.equal(one, right)


def test_two_threads_generate_with_one_model_that_neither_has_compiled() -> None:
    model = tiny_model("llama", layers=1)
    generator = torch.Generator().manual_seed(3)
    shapes = ((1, 5), (2, 9))
    tokens = [torch.randint(2, VOCABULARY, shape, generator=generator) for shape in shapes]
    calls = [functools.partial(_generate, model, tokens[i]) for i in range(2)]

    def run() -> list[Tensor]:
        found = _at_once(calls)
        assert all(isinstance(one, Tensor) for one in found), found
        return [one for one in found if isinstance(one, Tensor)]

    compiled_like_eager(model, run, options=emulated(gpu_memory=half_the_weights(model) * 13 // 10))


def test_two_models_generate_at_once_on_one_accelerator() -> None:
    """They share the budget and the staging ring, and take turns step by step."""
    models, tokens = [tiny_model(name, layers=1) for name in ("llama", "gpt2")], prompts(1)["input_ids"]
    expected = [_generate(model, tokens) for model in models]
    backend, options = RecordingBackend(), emulated(gpu_memory=sum(half_the_weights(model) for model in models))
    for model in models:
        model.compile(backend=backend, options=options)
    calls = [functools.partial(_generate, model, tokens, cache_implementation="static") for model in models]
    for _ in range(2):
        _assert_same(_at_once(calls), expected)
    counters = backend.accelerator.counters
    assert len({id(graph.runtime) for graph in backend.graphs}) == 1
    assert counters.uploaded_bytes["weights"] > 0
    assert counters.peak_bytes <= options["gpu_memory"]
    plans = [plan.schedule for graph in backend.graphs for plan in graph.plans]
    assert all(schedule.host_bytes > 0 for schedule in plans)
