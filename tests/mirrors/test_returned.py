"""What steps returned is answered as it was, as long as it is what it was."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hetegen_compile.accelerators import Op
from hetegen_compile.mirrors.record import Record
from tests.mirrors.steps import Steps


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
