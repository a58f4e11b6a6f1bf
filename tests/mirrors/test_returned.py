"""What steps returned: noted in a few words, answered once as it was, and a record for whoever asks otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hetegen_compile.accelerators import EmulatedAccelerator, Op
from hetegen_compile.accelerators.base import Value
from hetegen_compile.mirrors import Mirrors, NoRoomError, Request
from hetegen_compile.mirrors.record import Record

LIMIT = 1 << 20


class Steps:
    """Steps that return tensors of which the accelerator has the values, too."""

    def __init__(self, accelerator: EmulatedAccelerator) -> None:
        self.accelerator = accelerator
        self.mirrors = Mirrors(accelerator)

    def returns(self, *tensors: Tensor) -> list[Value]:
        """A step that returns these; the values of the accelerator."""
        self.mirrors.begin_step()
        values = [self.accelerator.upload(Op("made"), tensor) for tensor in tensors]
        for tensor, value in zip(tensors, values, strict=True):
            self.mirrors.register(tensor, value)
        self.count()
        return values

    def asks(self, *tensors: Tensor) -> list[Value | None]:
        """What the next step is given at once."""
        self.mirrors.begin_step()
        return self.mirrors.returned(tensors)

    def fetches(self, *tensors: Tensor, limit_bytes: int = LIMIT) -> list[Tensor]:
        """What the accelerator has of tensors that are asked for one by one."""
        values = self.mirrors.fetch([Request(one, "cache") for one in tensors], limit_bytes)
        self.count()
        return [self.accelerator.download(Op("look"), value) for value in values]

    def count(self) -> None:
        """No more is held than is counted: a budget is kept by that."""
        records = self.mirrors._records
        recorded = sum(record.nbytes for record in records._records.values())
        assert recorded + sum(noted.nbytes for noted in records._noted.values()) <= records.most_bytes

    @property
    def uploaded(self) -> int:
        return self.accelerator.counters.uploaded_bytes.get("mirrors", 0)


@pytest.fixture
def steps(accelerator: EmulatedAccelerator) -> Steps:
    return Steps(accelerator)


@pytest.fixture
def no_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """No record of a storage is made."""
    monkeypatch.setattr(Record, "__init__", None)


@pytest.mark.usefixtures("no_records")
def test_the_next_step_is_answered_without_any_record(steps: Steps) -> None:
    tensors = torch.ones(2, 8), torch.ones(3, dtype=torch.int32)
    values = steps.returns(*tensors)
    assert steps.asks(*tensors) == values
    more = torch.cat([tensors[0], tensors[0]])
    steps.returns(more)
    del tensors, values
    assert steps.asks(torch.ones(5)) == [None], "what a caller gives is nobody's result"


def test_what_nobody_has_any_more_is_let_go(steps: Steps) -> None:
    tensor = torch.ones(64)
    steps.returns(tensor)
    held = sum(steps.accelerator.counters.held_bytes.values())
    del tensor
    steps.mirrors.begin_step()
    assert sum(steps.accelerator.counters.held_bytes.values()) == held - 64 * 4


def _in_place(tensor: Tensor) -> None:
    tensor.zero_()


def _behind_its_first_bytes(tensor: Tensor) -> None:
    tensor[1] = 0


def _other_data(tensor: Tensor) -> None:
    tensor.data = torch.zeros(2, 8)


def _unseen(tensor: Tensor) -> None:
    tensor.numpy()[:] = 0


@pytest.mark.parametrize("change", [_in_place, _behind_its_first_bytes, _other_data, _unseen])
def test_what_was_changed_is_no_answer_and_goes_up(
    steps: Steps, change: Callable[[Tensor], None], caplog: pytest.LogCaptureFixture
) -> None:
    tensor = torch.ones(2, 8)
    steps.returns(tensor)
    before = steps.uploaded
    change(tensor)
    assert steps.asks(tensor) == [None]
    with caplog.at_level(logging.WARNING):
        assert torch.equal(steps.fetches(tensor)[0], tensor)
    assert steps.uploaded == before + 64
    told = "a tensor that a step returned was written in a way that torch does not see"
    assert (told in caplog.text) == (change is _unseen)


def _of_another_type(tensor: Tensor) -> None:
    tensor.data = tensor.data.view(torch.int32)


def _of_another_shape(tensor: Tensor) -> None:
    tensor.data = tensor.data.view(4, 4)


def _of_another_stride(tensor: Tensor) -> None:
    tensor.data = tensor.data.as_strided((2, 8), (1, 2))


def _cropped_in_place(tensor: Tensor) -> None:
    tensor.data = tensor.data[:1]


@pytest.mark.parametrize("change", [_of_another_type, _of_another_shape, _of_another_stride, _cropped_in_place])
def test_the_same_memory_seen_otherwise_is_no_answer(steps: Steps, change: Callable[[Tensor], None]) -> None:
    """For torch that is no write: the memory is there, but its value is another view of it."""
    tensor = torch.arange(16.0).view(2, 8).clone()
    steps.returns(tensor)
    before = steps.uploaded
    change(tensor)
    assert steps.asks(tensor) == [None]
    assert torch.equal(steps.fetches(tensor)[0], tensor)
    assert steps.uploaded == before


def test_tensors_that_exchanged_their_memory_are_not_taken_for_each_other(steps: Steps) -> None:
    one, other = torch.ones(2, 8), torch.ones(2, 8)
    other[1] = 2
    steps.returns(one, other)
    one.data, other.data = other.data, one.data
    assert steps.asks(one, other) == [None, None]
    assert torch.equal(steps.fetches(one)[0], one)
    assert torch.equal(steps.fetches(other)[0], other)


def test_a_tensor_that_counts_its_writes_by_itself_is_another_one(steps: Steps) -> None:
    """It lies where the other does, and has by chance been written as often."""
    tensor = torch.ones(2, 8)
    tensor.mul_(1).mul_(1)
    steps.returns(tensor)
    other = torch.empty(0).set_(tensor)  # type: ignore[call-overload]
    other[1] = 2
    assert other._version == tensor._version
    assert steps.asks(other) == [None]


def test_a_storage_that_has_grown_is_no_answer(steps: Steps) -> None:
    tensor = torch.ones(2, 8)
    steps.returns(tensor)
    tensor.untyped_storage().resize_(1 << 20)
    assert steps.asks(tensor) == [None]
    assert torch.equal(steps.fetches(tensor)[0], tensor)


def test_a_tensor_that_is_returned_again_has_its_last_value_alone(steps: Steps) -> None:
    tensor = torch.ones(2, 8)
    steps.fetches(tensor)
    (value,) = steps.returns(tensor)
    assert steps.accelerator.counters.held_bytes["mirrors"] == 0, "what was uploaded for it"
    assert steps.asks(tensor) == [value]


def test_a_view_of_what_torch_saw_written_is_no_unseen_write(steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
    tensor = torch.ones(2, 8)
    steps.returns(tensor.view(4, 4))
    tensor.mul_(3)
    with caplog.at_level(logging.WARNING):
        steps.mirrors.check()
    assert not caplog.text


def test_an_unseen_write_is_found_when_something_is_compiled(steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
    tensor = torch.ones(2, 8)
    steps.returns(tensor)
    _unseen(tensor)
    with caplog.at_level(logging.WARNING):
        steps.mirrors.check()
    assert "written in a way that torch does not see" in caplog.text


def test_a_write_that_torch_sees_is_no_unseen_one(steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
    """All fingerprints are compared when something is compiled: nobody is warned of what has a version."""
    tensor = torch.ones(2, 8)
    steps.returns(tensor)
    tensor.mul_(3)
    with caplog.at_level(logging.WARNING):
        steps.mirrors.check()
    assert not caplog.text


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
    (value,) = steps.returns(whole[4:12])
    steps.fetches(whole)
    steps.accelerator.launch(Op("write"), lambda x: x.mul_(2), (value,), mutates=(0,))
    window = whole[4:12]
    window.mul_(2)
    steps.mirrors.settle([window])
    assert torch.equal(steps.fetches(whole)[0], whole)
    assert torch.equal(steps.fetches(whole[4:12])[0], whole[4:12])


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


def test_a_cache_that_grows_needs_no_room_made(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """What died is no longer counted: a budget that holds two of them is enough for any number of steps."""
    monkeypatch.setattr("hetegen_compile.mirrors.records.Records.make_room", None)
    cache = torch.zeros(16, 8)
    steps.returns(cache)
    for _ in range(50):
        assert None not in steps.asks(cache)
        steps.fetches(torch.ones(1), limit_bytes=2 * cache.nbytes)
        cache = torch.zeros(16, 8)
        values = [steps.accelerator.upload(Op("made"), cache)]
        steps.mirrors.register(cache, values[0])


def test_a_part_of_a_storage_and_what_inference_made_are_records_at_once(steps: Steps) -> None:
    window = torch.arange(16.0)[4:12]
    with torch.inference_mode():
        inference = torch.ones(4)
    steps.returns(window, inference)
    assert steps.asks(window, inference) == [None, None]
    before = steps.uploaded
    assert torch.equal(steps.fetches(window)[0], window)
    assert steps.uploaded == before
