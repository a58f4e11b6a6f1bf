"""What steps returned becomes a record for whoever asks otherwise, and is counted and let go as any other."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hetegen_compile.accelerators import EmulatedAccelerator, Op
from hetegen_compile.accelerators.base import Value
from hetegen_compile.mirrors import Mirrors, NoRoomError, Request
from tests.mirrors.steps import LIMIT, Steps


def _transposed_in_place(tensor: Tensor) -> Tensor:
    return tensor.t_()


def _cropped(tensor: Tensor) -> Tensor:
    return tensor[:1]


def _another_tensor_there(tensor: Tensor) -> Tensor:
    return torch.empty(0).set_(tensor)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    ("other", "uploaded"),
    [(_cropped, 0), (Tensor.detach, 0), (_another_tensor_there, 64), (_transposed_in_place, 64)],
)
def test_whoever_asks_otherwise_finds_a_record(steps: Steps, other: Callable[[Tensor], Tensor], uploaded: int) -> None:
    """What has another version than the step left goes up again."""
    tensor = torch.arange(16.0).view(2, 8)
    steps.returns(tensor)
    before, asked = steps.uploaded, other(tensor)
    assert steps.asks(asked) == [None]
    assert torch.equal(steps.fetches(asked)[0], asked)
    assert steps.uploaded == before + uploaded


def test_a_change_before_anybody_asked_otherwise_is_seen_then(steps: Steps) -> None:
    """The record starts with the version that the step left, not with today's."""
    tensor = torch.ones(2, 8)
    steps.returns(tensor)
    tensor.mul_(3)
    steps.mirrors.begin_step()
    assert steps.fetches(tensor[:1])[0].eq(3).all()


def test_an_answer_may_be_asked_for_again_and_then_otherwise(steps: Steps) -> None:
    """Assisted decoding crops what it has read, and reads it again."""
    tensor = torch.ones(4, 8)
    (value,) = steps.returns(tensor)
    assert steps.asks(tensor) == steps.asks(tensor) == [value]
    before = steps.uploaded
    assert torch.equal(steps.fetches(tensor[:3])[0], tensor[:3])
    assert torch.equal(steps.fetches(tensor)[0], tensor)
    assert steps.uploaded == before


def test_two_tensors_in_one_storage_are_a_record(steps: Steps) -> None:
    tensor = torch.arange(16.0).view(2, 8)
    steps.returns(tensor, tensor.view(4, 4))
    assert steps.asks(tensor, tensor.view(4, 4)) == [None, None]
    before = steps.uploaded
    found = steps.fetches(tensor, tensor.view(4, 4))
    assert torch.equal(found[0], tensor)
    assert torch.equal(found[1], tensor.view(4, 4))
    assert steps.uploaded == before


def test_a_window_of_what_the_same_step_returned_takes_nothing_from_it(steps: Steps) -> None:
    tensor = torch.arange(16.0).view(2, 8).clone()
    steps.returns(tensor, tensor[1:])
    before = steps.uploaded
    steps.mirrors.begin_step()
    assert torch.equal(steps.fetches(tensor)[0], tensor)
    assert torch.equal(steps.fetches(tensor[1:])[0], tensor[1:])
    assert steps.uploaded == before


def test_what_lies_twice_is_counted_twice(steps: Steps) -> None:
    """Two tensors that are all of one storage, each with a value of its own, behind room that was counted anew."""
    window, tensor = torch.arange(16.0)[4:12], torch.arange(16.0)
    steps.returns(window, tensor.view(4, 4), tensor.view(2, 8))
    steps.fetches(torch.ones(1), limit_bytes=64 + 64 + 64 + 4)
    assert steps.mirrors._records.most_bytes == sum(record.nbytes for _, record in steps.mirrors._records)
    held = steps.accelerator.counters.held_bytes["mirrors"]
    assert held <= steps.mirrors._records.most_bytes
    del window, tensor
    steps.mirrors.begin_step()
    assert steps.mirrors._records.most_bytes == 0, "all of them have died"


def test_a_window_with_a_value_of_its_own_does_not_outlive_a_write_to_the_whole(steps: Steps) -> None:
    whole = torch.arange(16.0)
    steps.returns(whole[4:12])
    (value,) = steps.mirrors.fetch([Request(whole, "whole")], LIMIT)
    steps.accelerator.launch(Op("write"), lambda x: x.mul_(2), (value,), mutates=(0,))
    whole.mul_(2)
    steps.mirrors.settle([whole])
    assert torch.equal(steps.fetches(whole[4:12])[0], whole[4:12])
    assert torch.equal(steps.fetches(whole)[0], whole)


def test_the_whole_does_not_outlive_a_write_to_a_window_with_a_value_of_its_own(steps: Steps) -> None:
    whole = torch.arange(16.0)
    steps.returns(whole[4:12])
    steps.fetches(whole)
    (value,) = steps.mirrors.fetch([Request(whole[4:12], "window")], LIMIT)
    steps.accelerator.launch(Op("write"), lambda x: x.mul_(2), (value,), mutates=(0,))
    window = whole[4:12]
    window.mul_(2)
    steps.mirrors.settle([window])
    assert torch.equal(steps.fetches(whole)[0], whole)
    assert torch.equal(steps.fetches(whole[4:12])[0], whole[4:12])


def packed(accelerator: EmulatedAccelerator, whole: Tensor, *, alike: bool) -> list[Value]:
    """Keys and values of a projection on the accelerator: views of one storage, ``alike``, or by themselves."""
    if not alike:
        return [accelerator.upload(Op("part"), part.clone()) for part in whole.unbind(1)[1:]]
    value = accelerator.upload(Op("whole"), whole)
    return [accelerator.launch(Op("part"), Tensor.select, (value, 1, i)) for i in (1, 2)]


@pytest.mark.parametrize("alike", [True, False])
def test_parts_of_one_storage_share_memory_and_show_what_the_host_has(steps: Steps, alike: bool) -> None:
    whole = torch.randn(50, 3, 200)
    _, keys, values = whole.unbind(1)
    steps.mirrors.begin_step()
    for tensor, value in zip((keys, values), packed(steps.accelerator, whole, alike=alike), strict=True):
        steps.mirrors.register(tensor, value)
        steps.count()
    counted = steps.mirrors.held_bytes("mirrors")
    assert counted == whole.nbytes if alike else counted == 2 * whole.nbytes
    del value
    steps.accelerator.synchronize()
    gc.collect()
    assert sum(steps.accelerator.counters.held_bytes.values()) <= counted
    steps.mirrors.begin_step()
    uploaded = steps.uploaded
    for tensor in (keys, values):
        assert torch.equal(steps.fetches(tensor)[0], tensor)
    assert steps.uploaded == uploaded, "they are there"
    assert torch.equal(steps.fetches(whole)[0], whole), "what was not returned is uploaded"
    assert steps.uploaded == uploaded + whole.nbytes
    steps.mirrors.make_room(0)
    gc.collect()
    assert steps.mirrors.held_bytes("mirrors") == 0
    steps.accelerator.synchronize()
    assert sum(steps.accelerator.counters.held_bytes.values()) == 0


def test_what_shares_memory_holds_it_until_the_last_part_is_gone(steps: Steps) -> None:
    whole = torch.randn(50, 3, 200)
    _, keys, values = whole.unbind(1)
    steps.mirrors.begin_step()
    for tensor, value in zip((keys, values), packed(steps.accelerator, whole, alike=True), strict=True):
        steps.mirrors.register(tensor, value)
    steps.mirrors.begin_step()
    steps.fetches(values)
    steps.mirrors.begin_step()
    with pytest.raises(NoRoomError):
        steps.fetches(values, limit_bytes=whole.nbytes - 1)
    assert torch.equal(steps.fetches(values, limit_bytes=whole.nbytes)[0], values)


def test_an_interrupt_leaves_no_less_counted_than_is_held(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    tensor = torch.ones(16)
    value = steps.accelerator.upload(Op("made"), tensor)
    monkeypatch.setattr("hetegen_compile.mirrors.records.Returned", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps.mirrors.register(tensor, value)
    steps.mirrors.forget_all_but_weights()
    assert steps.mirrors._records.most_bytes >= 0


def _forget(mirrors: Mirrors, tensor: Tensor) -> None:
    mirrors.forget([tensor])


def _forget_all(mirrors: Mirrors, _: Tensor) -> None:
    mirrors.forget()


def _forget_all_but_weights(mirrors: Mirrors, _: Tensor) -> None:
    mirrors.forget_all_but_weights()


@pytest.mark.parametrize("forget", [_forget, _forget_all, _forget_all_but_weights])
def test_what_a_failed_step_may_have_written_is_forgotten(
    steps: Steps, forget: Callable[[Mirrors, Tensor], None]
) -> None:
    tensor = torch.ones(2, 8)
    steps.returns(tensor)
    forget(steps.mirrors, tensor)
    assert steps.asks(tensor) == [None]
    assert steps.mirrors.held_bytes("mirrors") == 0


def test_room_is_made_of_what_the_step_does_not_read(steps: Steps) -> None:
    read, unread = torch.ones(16), torch.ones(16)
    value, _ = steps.returns(read, unread)
    assert steps.asks(read) == [value]
    steps.fetches(torch.ones(8), limit_bytes=64 + 32)
    assert steps.asks(read, unread) == [None, None], "both are records now"
    before = steps.uploaded
    steps.fetches(read)
    assert steps.uploaded == before
    steps.fetches(unread)
    assert steps.uploaded == before + 64


def test_room_that_was_made_is_there_in_the_next_step(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    read, unread = torch.ones(16), torch.ones(16)
    steps.returns(read, unread)
    steps.asks(read)
    steps.fetches(torch.ones(8), limit_bytes=64 + 32)
    monkeypatch.setattr("hetegen_compile.mirrors.records.Records.make_room", None)
    steps.mirrors.begin_step()
    steps.fetches(read, torch.ones(8), limit_bytes=64 + 32)


def test_what_the_step_reads_is_no_room(steps: Steps) -> None:
    tensor = torch.ones(16)
    steps.returns(tensor)
    steps.asks(tensor)
    with pytest.raises(NoRoomError):
        steps.fetches(torch.ones(8), limit_bytes=64)
