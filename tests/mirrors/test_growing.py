"""Mirrors of caches that grow: they are moved to where there is room, and a block counts once."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from hetegen_compile.accelerators import Op
from hetegen_compile.accelerators.base import Value
from hetegen_compile.accelerators.growing import block_of, room_behind
from hetegen_compile.host_memory.growing import append
from hetegen_compile.mirrors import NoRoomError, Request
from hetegen_compile.mirrors.record import Record
from tests.mirrors.steps import LIMIT, Steps

NOTHING = torch.tensor([])


def fetched(steps: Steps, tensor: Tensor, tokens: int, limit_bytes: int = LIMIT) -> Value:
    """A step's value of a cache, with room for ``tokens``."""
    request = Request(tensor, "keys")
    (value,) = steps.mirrors.fetch([request], limit_bytes)
    found = steps.mirrors.give_room(request, value, tokens, limit_bytes)
    steps.count()
    return found


def lengthened(steps: Steps, tensor: Tensor, value: Value, new: Tensor) -> tuple[Tensor, Value]:
    """What a step makes of both: the longer cache of the host and that of the accelerator, registered."""

    def write(cache: Tensor, new: Tensor) -> tuple[()]:
        cache[:, :, cache.shape[2] - new.shape[2] :].copy_(new)
        return ()

    accelerator, longer = steps.accelerator, append(tensor, new)
    found = accelerator.lengthen(Op("longer"), value, new.shape[2])
    accelerator.launch(Op("write"), write, (found, accelerator.upload(Op("new"), new)), outputs=0, mutates=(0,))
    steps.mirrors.register(longer, found)
    steps.count()
    return longer, found


def cache(tokens: int) -> Tensor:
    return append(NOTHING, torch.randn(1, 2, tokens, 8))


def test_a_moved_one_is_the_mirror_from_then_on(steps: Steps) -> None:
    tensor = cache(4)
    steps.mirrors.begin_step()
    value = fetched(steps, tensor, 9)
    assert room_behind(value) == 5
    before = steps.uploaded
    steps.mirrors.begin_step()
    assert torch.equal(steps.fetches(tensor)[0], tensor)
    assert steps.uploaded == before
    assert steps.accelerator.counters.held_bytes["mirrors"] == 9 * 64, "what it was moved from has gone"


def test_a_step_that_moves_one_closes_no_gates(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes memory that nobody looked for when the step began."""
    told: list[bool] = []
    monkeypatch.setattr(steps.accelerator, "close_no_gates", lambda: told.append(True))
    steps.mirrors.begin_step()
    fetched(steps, cache(4), 9)
    assert told == [True]


def test_a_write_is_seen_wherever_it_lies(steps: Steps) -> None:
    tensor = cache(4)
    steps.mirrors.begin_step()
    fetched(steps, tensor, 9)
    tensor.mul_(2)
    assert torch.equal(steps.fetches(tensor)[0], tensor)


def test_the_longer_one_and_the_shorter_one_count_as_one_block(steps: Steps) -> None:
    tensor = cache(4)
    steps.mirrors.begin_step()
    value = fetched(steps, tensor, 9)
    longer, found = lengthened(steps, tensor, value, torch.randn(1, 2, 1, 8))
    steps.mirrors.begin_step()
    other = torch.randn(2, 8)
    assert torch.equal(steps.fetches(other, limit_bytes=9 * 64 + other.nbytes)[0], other)
    before = steps.uploaded
    assert steps.mirrors.returned([longer]) == [None], "what was noted became a record, to look for room"
    for one in (tensor, longer):
        assert torch.equal(steps.fetches(one)[0], one)
    assert steps.uploaded == before, "nothing was dropped"
    assert block_of(found) is block_of(value)


def test_of_two_in_one_block_dropping_one_frees_nothing(steps: Steps) -> None:
    tensor, other = cache(4), torch.randn(2, 64)
    steps.mirrors.begin_step()
    longer = lengthened(steps, tensor, fetched(steps, tensor, 9), torch.randn(1, 2, 1, 8))[0]
    steps.mirrors.begin_step()
    steps.fetches(other, limit_bytes=9 * 64)  # both go
    steps.accelerator.synchronize()
    assert steps.accelerator.counters.held_bytes["mirrors"] == other.nbytes
    steps.mirrors.begin_step()
    assert torch.equal(steps.fetches(longer)[0], longer)


def test_what_a_step_uses_stays_and_is_refused_where_it_does_not_fit(steps: Steps) -> None:
    tensor = cache(4)
    steps.mirrors.begin_step()
    request = Request(tensor, "keys")
    (value,) = steps.mirrors.fetch([request], 4 * 64)
    with pytest.raises(NoRoomError) as caught:
        steps.mirrors.give_room(request, value, 9, 9 * 64)
    assert caught.value.excess_bytes == 4 * 64
    assert torch.equal(steps.accelerator.download(Op("look"), value), tensor)


def test_the_memory_of_those_that_have_died_is_given_back(steps: Steps) -> None:
    tensor = cache(4)
    steps.mirrors.begin_step()
    longer, found = lengthened(steps, tensor, fetched(steps, tensor, 9), torch.randn(1, 2, 1, 8))
    del tensor, found
    steps.mirrors.begin_step()
    steps.accelerator.synchronize()
    assert steps.accelerator.counters.held_bytes["mirrors"] == 9 * 64
    assert steps.mirrors._records.most_bytes == 9 * 64
    del longer
    steps.mirrors.begin_step()
    steps.accelerator.synchronize()
    assert steps.accelerator.counters.held_bytes["mirrors"] == 0
    assert steps.mirrors._records.most_bytes == 0


def test_a_part_of_a_storage_moves_by_itself(steps: Steps) -> None:
    whole = cache(6)
    cut = whole[:, :, :4]
    steps.returns(whole)
    steps.mirrors.begin_step()
    value = fetched(steps, cut, 9)
    assert torch.equal(steps.accelerator.download(Op("look"), value), cut)
    longer, found = lengthened(steps, cut, value, torch.randn(1, 2, 1, 8))
    assert torch.equal(steps.accelerator.download(Op("look"), found), longer)
    assert torch.equal(steps.fetches(whole)[0], whole)
    assert torch.equal(steps.fetches(cut)[0], cut)


def counted(steps: Steps) -> int:
    """Bytes that are held, which are those that are counted: no more is there, and no more is kept from others."""
    gc.collect()
    steps.accelerator.synchronize()
    records = steps.mirrors._records
    memories = set[object]().union(*(record.memories for _, record in records))
    shared = sum(memory.nbytes for memory in memories)  # type: ignore[attr-defined]
    found = sum(record.own_bytes for _, record in records) + shared
    held = sum(n for category, n in steps.accelerator.counters.held_bytes.items() if category != "slots")
    assert held == found <= records.most_bytes
    return found


def test_a_moved_part_and_the_whole_are_there_both(steps: Steps) -> None:
    whole = cache(6)
    cut = whole[:, :, :4]
    steps.mirrors.begin_step()
    fetched(steps, cut, 9)
    steps.mirrors.begin_step()
    steps.fetches(whole)
    assert counted(steps) == 9 * 64 + 6 * 64


def test_inputs_that_are_parts_of_one_tensor_get_blocks_of_their_own(steps: Steps) -> None:
    packed = torch.randn(2, 6, 1, 2, 8)
    parts = [part.permute(1, 2, 0, 3) for part in packed]
    requests = [Request(part, "part", whole=True) for part in parts]
    steps.mirrors.begin_step()
    values = steps.mirrors.fetch(requests, LIMIT)
    for i, request in enumerate(requests):
        values[i] = steps.mirrors.give_room(request, values[i], 9, LIMIT)
    assert counted(steps) == 2 * 9 * 64, "what they were parts of has gone"
    for value, part in zip(values, parts, strict=True):
        assert torch.equal(steps.accelerator.download(Op("look"), value), part)
    values.clear()
    del value
    steps.mirrors.begin_step()
    steps.mirrors.fit(0)
    assert counted(steps) == 0


def test_a_moved_part_goes_when_room_is_needed_for_another(steps: Steps) -> None:
    whole = torch.randn(200, 1, 2, 8).permute(1, 2, 0, 3)
    cut, other = whole[:, :, :4], whole[:, :, 100:104]
    steps.mirrors.begin_step()
    fetched(steps, cut, 300)
    steps.mirrors.begin_step()
    steps.fetches(other, limit_bytes=300 * 64 - 1)
    assert counted(steps) == whole.nbytes, "the other one is mirrored through the whole"


def test_a_moved_part_that_a_step_writes_stays_counted(steps: Steps) -> None:
    cut = torch.randn(200, 1, 2, 8).permute(1, 2, 0, 3)[:, :, :4]
    steps.mirrors.begin_step()
    value = fetched(steps, cut, 300)
    steps.mirrors.settle([cut])
    del value
    assert counted(steps) == 300 * 64


def test_what_was_moved_before_there_was_no_room_is_there(steps: Steps) -> None:
    """The step that follows an aborted one finds it."""
    tensors = cache(4), cache(4)
    requests = [Request(tensor, "keys") for tensor in tensors]
    steps.accelerator.begin_step()
    steps.mirrors.begin_step()
    values = steps.mirrors.fetch(requests, LIMIT)
    steps.accelerator.launch(Op("slow"), _slowly, (), outputs=0)
    steps.mirrors.give_room(requests[0], values[0], 9, LIMIT)
    with pytest.raises(NoRoomError):
        steps.mirrors.give_room(requests[1], values[1], 90, 64 * 20)
    steps.accelerator.abandon_step()
    steps.mirrors.begin_step()
    for found, tensor in zip(steps.fetches(*tensors), tensors, strict=True):
        assert torch.equal(found, tensor)


def _slowly() -> tuple[()]:
    time.sleep(0.2)
    return ()


def test_an_interrupt_behind_a_move_leaves_no_less_counted(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = cache(4)
    steps.mirrors.begin_step()
    request = Request(tensor, "keys")
    (value,) = steps.mirrors.fetch([request], LIMIT)
    moved = Record.move

    def interrupted(*arguments: Any, **options: Any) -> None:
        moved(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Record, "move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps.mirrors.give_room(request, value, 9, LIMIT)
    del value
    steps.count()


def test_what_a_step_writes_lies_with_no_other(steps: Steps) -> None:
    tensor = cache(4)
    steps.mirrors.begin_step()
    longer, _ = lengthened(steps, tensor, fetched(steps, tensor, 9), torch.randn(1, 2, 1, 8))
    before = tensor.clone()
    steps.mirrors.begin_step()
    steps.mirrors.separate([longer])
    (value,) = steps.mirrors.fetch([Request(longer, "keys")], LIMIT)
    steps.accelerator.launch(Op("write"), lambda x: (x.zero_(), ())[1], (value,), outputs=0, mutates=(0,))
    assert torch.equal(steps.fetches(tensor)[0], before)
    steps.mirrors.begin_step()
    alone = cache(4)
    value = fetched(steps, alone, 9)
    steps.mirrors.separate([alone])
    assert steps.mirrors.fetch([Request(alone, "keys")], LIMIT) == [value], "it lies by itself"


def test_a_window_of_a_cache_in_a_block_counts_with_it(steps: Steps) -> None:
    """Both are what a step returns, and lie in one memory."""
    whole = torch.randn(10, 1, 2, 8).permute(1, 2, 0, 3)
    window = whole[:, :, 5:]
    steps.mirrors.begin_step()
    value = steps.accelerator.new_cache(Op("keys"), whole, 200)
    part = steps.accelerator.launch(Op("window"), lambda x: x[:, :, 5:], (value,))
    steps.mirrors.register(whole, value)
    steps.mirrors.register(window, part)
    del value, part
    assert counted(steps) == 200 * 64


def test_parts_that_have_no_version_are_moved_within_what_is_counted(steps: Steps) -> None:
    with torch.inference_mode():
        packed = torch.randn(2, 600, 1, 2, 8)
        parts = [part.permute(1, 2, 0, 3) for part in packed]
    requests = [Request(part, "part", whole=True) for part in parts]
    steps.mirrors.begin_step()
    values = steps.mirrors.fetch(requests, LIMIT)
    values[0] = steps.mirrors.give_room(requests[0], values[0], 601, LIMIT)
    assert counted(steps) == packed.nbytes + 601 * 64, "the other one lies in what was uploaded"


def test_what_is_written_and_may_get_company_has_no_standing_answer(steps: Steps) -> None:
    tensor = cache(4)
    steps.mirrors.begin_step()
    fetched(steps, tensor, 9)
    assert steps.mirrors.settle([tensor]) is None
    other = torch.randn(1, 2, 4, 8)
    steps.fetches(other)
    assert steps.mirrors.settle([other]) is not None
