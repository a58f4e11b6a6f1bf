"""Caches that grow on the accelerator: a longer one lies where the shorter one does, and both stay what they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache

import hetegen_compile
from hetegen_compile.accelerators.growing import Block, block_of
from hetegen_compile.passes.append_tokens import append_tokens
from hetegen_compile.runtime import live_runtimes
from hetegen_compile.steps.segments import inductor_compiler
from tests.models.architectures import tiny_model
from tests.models.harness import (
    RecordingBackend,
    assert_offloaded,
    emulated,
    half_the_weights,
    new_schedules,
    through_inductor,
)

PROMPT, STEPS = 12, 6
TOKENS = torch.randint(2, 256, (2, 64), generator=torch.Generator().manual_seed(1))


class Pair:
    """A compiled model beside eager, each with its own cache: both get the same tokens."""

    def __init__(self, model: Any, *, gpu_memory: int = 0, **options: Any) -> None:
        self.eager, self.model, self.backend = copy.deepcopy(model), model, RecordingBackend()
        self.options = emulated(gpu_memory=gpu_memory or half_the_weights(model), **options)
        self.model.compile(backend=self.backend, options=self.options)
        self.known = hetegen_compile.schedules()

    def cache(self) -> tuple[DynamicCache, DynamicCache]:
        """An empty one of each."""
        return DynamicCache(config=self.model.config), DynamicCache(config=self.model.config)

    def step(self, tokens: Tensor, caches: tuple[DynamicCache, DynamicCache]) -> None:
        """One forward of both; logits and caches are alike."""
        with torch.no_grad():
            found = self.model(tokens, past_key_values=caches[0]).logits
            right = self.eager(tokens, past_key_values=caches[1]).logits
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
        for mine, eagers in zip(tensors_of(caches[0]), tensors_of(caches[1]), strict=True):
            torch.testing.assert_close(mine, eagers, rtol=1e-4, atol=1e-5)

    def assert_offloaded(self) -> None:
        """Something was split and streamed."""
        assert_offloaded(self.backend, new_schedules(self.known), self.options)


def tensors_of(cache: Any) -> list[Tensor]:
    """Keys and values of all layers."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def copied(caches: tuple[DynamicCache, DynamicCache]) -> tuple[DynamicCache, DynamicCache]:
    """Caches of the same tensors, which nobody has copied."""
    found = tuple(copy.copy(cache) for cache in caches)
    for cache in found:
        cache.layers = [copy.copy(layer) for layer in cache.layers]
    return found  # type: ignore[return-value]


def blocks(cache: DynamicCache) -> list[Block | None]:
    """Where each tensor of a cache lies on the accelerator; None: in no memory with room."""
    (runtime,) = live_runtimes()
    return [block_of(value) for value in runtime.mirrors.returned(tensors_of(cache))]


def held_bytes(pair: Pair) -> int:
    """What is on the accelerator now."""
    return sum(pair.backend.accelerator.counters.held_bytes.values())


@pytest.mark.parametrize("batch", [1, 2])
def test_a_longer_cache_lies_where_the_shorter_one_does(batch: int) -> None:
    pair = Pair(tiny_model("llama", layers=2), context=PROMPT + STEPS)
    caches = pair.cache()
    pair.step(TOKENS[:batch, :PROMPT], caches)
    lies, held = blocks(caches[0]), []
    assert len(set(lies)) == 4
    assert None not in lies, "a prompt's are made with room"
    assert {block.tokens for block in lies if block is not None} == {PROMPT + STEPS}
    for place in range(PROMPT, PROMPT + STEPS):
        uploaded = pair.backend.accelerator.counters.uploaded_bytes.get("mirrors", 0)
        pair.step(TOKENS[:batch, place : place + 1], caches)
        assert blocks(caches[0]) == lies
        assert [block.used for block in lies if block is not None] == [place + 1] * 4
        moved = pair.backend.accelerator.counters.uploaded_bytes.get("mirrors", 0) - uploaded
        assert place == PROMPT or moved < 1024, "tokens, positions and masks"
        held.append(held_bytes(pair))
    assert len(set(held[1:])) == 1, "no step holds more than the one before"
    source = pair.backend.graphs[-1].plans[-1].bound.source
    called = [line for line in source.splitlines() if "= list(launch(" in line]
    assert len(called) == 2
    assert all("mutates=()" not in line for line in called), "they write what they are given"
    pair.assert_offloaded()


def test_caches_of_which_nobody_said_how_long_they_get_move_now_and_then() -> None:
    pair = Pair(tiny_model("llama", layers=1))
    caches, lay = pair.cache(), []
    pair.step(TOKENS[:1, :8], caches)
    for place in range(8, 60):
        pair.step(TOKENS[:1, place : place + 1], caches)
        lay.append(blocks(caches[0])[0])
    assert None not in lay
    moves = sum(one is not other for one, other in zip(lay, lay[1:], strict=False))
    assert 1 <= moves <= 8, "twice as long each time, less where memory is short"
    assert all(schedule.streamed_bytes > 0 for schedule in new_schedules(pair.known)), "which may be planned anew"


def test_who_keeps_a_shorter_one_goes_on_from_it() -> None:
    """Behind it there is another's token by then, which it must neither see nor write over."""
    pair = Pair(tiny_model("llama", layers=2), context=40)
    first = pair.cache()
    pair.step(TOKENS[:1, :PROMPT], first)
    second = copied(first)
    for place in (20, 21, 22):
        pair.step(TOKENS[:1, place : place + 1], first)
        pair.step(TOKENS[1:, place : place + 1], second)
    assert set(blocks(first[0])).isdisjoint(blocks(second[0]))
    third = copied(first)
    pair.step(TOKENS[:1, 30:31], third)
    pair.step(TOKENS[:1, 31:32], first)
    pair.step(TOKENS[:1, 32:33], second)
    pair.assert_offloaded()


def test_a_cropped_one_moves() -> None:
    pair = Pair(tiny_model("llama", layers=2), context=40)
    caches = pair.cache()
    pair.step(TOKENS[:1, :PROMPT], caches)
    for place in (20, 24, 28):
        pair.step(TOKENS[:1, place : place + 1], caches)
        pair.step(TOKENS[:1, place + 1 : place + 2], caches)
        layers: list[Any] = [layer for cache in caches for layer in cache.layers]
        for layer in layers:
            layer.keys, layer.values = layer.keys[:, :, : PROMPT - 1], layer.values[:, :, : PROMPT - 1]
        pair.step(TOKENS[:1, place + 2 : place + 3], caches)
        assert None not in blocks(caches[0])
    pair.assert_offloaded()


def test_several_tokens_at_once_go_behind_it() -> None:
    """Their number is a size of the graph."""
    model = tiny_model("llama", layers=2)
    pair = Pair(model, context=60, gpu_memory=half_the_weights(model) * 3 // 2)
    caches, place = pair.cache(), 5
    pair.step(TOKENS[:, :place], caches)
    for tokens in (3, 4, 5, 7, 2, 6):
        pair.step(TOKENS[:, place : place + tokens], caches)
        place += tokens
        assert {block.used for block in blocks(caches[0]) if block is not None} == {place}
    pair.assert_offloaded()


def test_conversations_of_which_one_fits_take_turns() -> None:
    model = tiny_model("llama", layers=2)
    pair = Pair(model, context=40)
    caches = [pair.cache() for _ in range(3)]
    for one in caches:
        pair.step(TOKENS[:1, :PROMPT], one)
    for place in (20, 21, 22):
        for one in caches:
            pair.step(TOKENS[:1, place : place + 1], one)
            pair.step(TOKENS[1:, place : place + 1], one)
    pair.assert_offloaded()


def test_what_was_made_in_inference_mode_is_lengthened_outside() -> None:
    pair = Pair(tiny_model("llama", layers=1), context=40)
    caches = pair.cache()
    with torch.inference_mode():
        pair.step(TOKENS[:1, :PROMPT], caches)
        pair.step(TOKENS[:1, 20:21], caches)
    for place in (21, 22, 23):
        pair.step(TOKENS[:1, place : place + 1], caches)
    pair.assert_offloaded()


class Twice(nn.Module):
    """Makes longer caches of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(64, 128, bias=False), nn.Linear(64, 1024, bias=False)

    def forward(self, x: Tensor, past: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.proj(x).view(1, -1, 4, 32).transpose(1, 2).chunk(2, 1)
        keys, values = torch.cat([past, k], dim=-2), torch.cat([other, v], dim=-2)
        return self.out(torch.relu(x)) + (keys @ values.transpose(-1, -2)).sum() + past.shape[-2], keys, values


@through_inductor
@pytest.mark.parametrize("inductor", [False, True])
@pytest.mark.parametrize("same", ["two", "views of one", "one twice"])
def test_what_lies_in_one_place_gets_places_of_its_own(same: str, inductor: bool) -> None:
    torch.manual_seed(0)
    model, known = Twice().eval(), hetegen_compile.schedules()
    backend = RecordingBackend(inductor_compiler) if inductor else RecordingBackend()
    options = emulated(gpu_memory=half_the_weights(model), split=0.5)
    past, other = (append_tokens(torch.tensor([]), torch.randn(1, 2, 4, 32) / 8) for _ in range(2))
    mine: Any = {"two": (past, other), "views of one": (past, past[:, :, :]), "one twice": (past, past)}[same]
    eagers = mine
    compiled = torch.compile(model, backend=backend, options=options)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, 1, 64)
            right, *eagers = model(x, *eagers)
            found, *mine = compiled(x, *mine)
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(mine, eagers, rtol=1e-4, atol=1e-5)
        for _ in range(2):  # a value with room behind it, for two inputs
            mine, eagers = [mine[0], mine[0].detach()], [eagers[0], eagers[0].detach()]
            (found, *mine), (right, *eagers) = compiled(x, *mine), model(x, *eagers)
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(mine, eagers, rtol=1e-4, atol=1e-5)
    assert_offloaded(backend, new_schedules(known), options)
    found = backend.graphs[-1].plans[-1].bound.source.count("= lengthen(")
    assert found == (0 if same == "one twice" else 2), "of one that is read twice copies are made, which lie otherwise"


def test_what_is_made_once_has_no_room() -> None:
    """The caches of an encoder's states: no token goes into them."""
    torch.manual_seed(0)
    config = BartConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=128, max_position_embeddings=64, forced_eos_token_id=None,
        eos_token_id=None, decoder_start_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model, known, backend = BartForConditionalGeneration(config).eval(), hetegen_compile.schedules(), RecordingBackend()
    ids = torch.randint(4, 128, (1, 17))
    expected = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=1)
    options = emulated(gpu_memory=half_the_weights(model), split=0.5, context=24)
    model.compile(backend=backend, options=options)
    assert torch.equal(model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=1), expected)
    made = [line for graph in backend.graphs for plan in graph.plans for line in plan.bound.source.splitlines()
            if "= new_cache(" in line]  # fmt: skip
    assert sorted(line.rsplit(", ", 1)[1] for line in made) == ["0)", "0)", "24)", "24)"]
    assert all(schedule.host_bytes > 0 for schedule in new_schedules(known))


class Attends(Twice):
    """Its results are of what attention reads of both."""

    def forward(self, x: Tensor, past: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.proj(x).view(1, x.shape[1], 4, 32).transpose(1, 2).chunk(2, 1)
        keys, values = torch.cat([past, k], dim=-2), torch.cat([other, v], dim=-2)
        seen = (k @ keys.transpose(-1, -2)) @ values
        return self.out(seen.transpose(1, 2).reshape(1, x.shape[1], 64)), keys, values


class Writes(nn.Module):
    """Writes a cache in place."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(64, 64, bias=False), nn.Linear(64, 1024, bias=False)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        past.mul_(2.0).add_(self.proj(x).mean())
        result: Tensor = self.out(x) + past.sum()
        return result


def given_cache(tokens: int) -> Tensor:
    """One that the caller has made, as a step would return it."""
    return append_tokens(torch.tensor([]), torch.randn(1, 2, tokens, 32) / 8)


def alike(found: Any, right: Any) -> None:
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("written", ["shorter", "longer"])
def test_what_another_graph_writes_to_one_is_not_in_the_other(written: str) -> None:
    """On the host they share nothing: the shorter one came from the caller."""
    torch.manual_seed(0)
    reads, writes, backend = Attends().eval(), Writes().eval(), RecordingBackend()
    eager_reads, eager_writes = copy.deepcopy(reads), copy.deepcopy(writes)
    options = emulated(gpu_memory=half_the_weights(reads) * 2, split=0.5)
    reads.compile(backend=backend, options=options)
    writes.compile(backend=backend, options=options)
    with torch.no_grad():
        shorter = given_cache(22), given_cache(22)
        eagers = shorter[0].clone(), shorter[1].clone()
        x = torch.randn(1, 1, 64)
        (_, *longer), (_, *eagers_longer) = reads(x, *shorter), eager_reads(x, *eagers)
        mine, right = (shorter, eagers) if written == "shorter" else (longer, eagers_longer)
        alike(writes(x, mine[0]), eager_writes(x, right[0]))
        mine, right = (longer, eagers_longer) if written == "shorter" else (shorter, eagers)
        alike(reads(x, *mine), eager_reads(x, *right))
        for _ in range(2):  # what is written each time has become the beginning of another meanwhile
            (_, *longer), (_, *eagers_longer) = reads(x, *shorter), eager_reads(x, *eagers)
            alike(writes(x, shorter[0]), eager_writes(x, eagers[0]))
            alike(reads(x, *longer), eager_reads(x, *eagers_longer))


@pytest.mark.parametrize("written", ["shorter", "longer"])
def test_what_has_been_written_before_is_looked_at_each_time(written: str) -> None:
    """Behind what one graph writes again and again another has put a token meanwhile, for which nothing was moved."""
    torch.manual_seed(0)
    reads, writes, backend = Attends().eval(), Writes().eval(), RecordingBackend()
    eager_reads, eager_writes = copy.deepcopy(reads), copy.deepcopy(writes)
    options = emulated(gpu_memory=4 << 20, split=0.5, context=400)
    reads.compile(backend=backend, options=options)
    writes.compile(backend=backend, options=options)
    with torch.no_grad():
        for _ in range(4):
            mine = given_cache(20), given_cache(20)
            eagers = mine[0].clone(), mine[1].clone()
            for count in (1, 1, 255):  # by then the host's memory is full, and not the accelerator's
                x = torch.randn(1, count, 64)
                mine, eagers = reads(x, *mine)[1:], eager_reads(x, *eagers)[1:]
            eagers = eagers[0].clone(), eagers[1].clone()
            writes(torch.randn(1, 1, 64), given_cache(277))
            x = torch.randn(1, 1, 64)
            alike(writes(x, mine[0]), eager_writes(x, eagers[0]))
            x = torch.randn(1, 1, 64)
            longer, eagers_longer = reads(x, *mine)[1:], eager_reads(x, *eagers)[1:]
            assert longer[0].data_ptr() != mine[0].data_ptr()
            x = torch.randn(1, 1, 64)
            first, right = (mine, eagers) if written == "shorter" else (longer, eagers_longer)
            alike(writes(x, first[0]), eager_writes(x, right[0]))
            second, right = (longer, eagers_longer) if written == "shorter" else (mine, eagers)
            alike(reads(x, *second)[0], eager_reads(x, *right)[0])


class More(Attends):
    """Appends more tokens than it is given, by a rule."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, x: Tensor, past: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = x.shape[1]
        if self.rule == "one more":
            x = torch.cat([x, x[:, :1]], 1)
        elif self.rule == "a multiple of four":
            x = functional.pad(x, (0, 0, 0, (-count) % 4))
        elif self.rule == "four at least":
            x = functional.pad(x, (0, 0, 0, torch.sym_max(count, 4) - count))
        return super().forward(x, past, other)


@pytest.mark.parametrize(
    ("rule", "tokens"),
    [("one more", (3, 4, 5, 2)), ("a multiple of four", (3, 5, 6, 2)), ("four at least", (3, 2, 5)), ("none", (0, 0))],
)
def test_a_number_of_new_tokens_may_be_computed_or_none(rule: str, tokens: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, backend = More(rule).eval(), RecordingBackend()
    eager = copy.deepcopy(model)
    model.compile(backend=backend, options=emulated(gpu_memory=half_the_weights(model) * 3, split=0.5))
    mine: Any = given_cache(9), given_cache(9)
    eagers = mine
    with torch.no_grad():
        for count in tokens:
            x = torch.randn(1, count, 64)
            (found, *mine), (right, *eagers) = model(x, *mine), eager(x, *eagers)
            alike(found, right)
            alike(mine, eagers)
    assert "= lengthen(" in backend.graphs[-1].plans[-1].bound.source


def test_packed_caches_are_moved_within_their_plan(caplog: pytest.LogCaptureFixture) -> None:
    """Keys and values as slices of one tensor: no forward needs more than it was planned with."""
    torch.manual_seed(0)
    model, backend = Attends().eval(), RecordingBackend()
    eager = copy.deepcopy(model)
    model.compile(backend=backend, options=emulated(gpu_memory=420_000, split=0.5))
    with torch.no_grad():
        for tokens in range(120, 124):
            packed = torch.randn(2, tokens, 1, 2, 32) / 4
            given, x = [part.permute(1, 2, 0, 3) for part in packed], torch.randn(1, 1, 64)
            alike(model(x, *given), eager(x, *given))
    assert not caplog.records, "gpu_memory is lowered where memory runs out"
    assert "= lengthen(" in backend.graphs[-1].plans[-1].bound.source
