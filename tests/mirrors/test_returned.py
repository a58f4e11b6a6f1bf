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
        self.records: list[Record] = []

    def returns(self, *tensors: Tensor) -> list[Value]:
        """A step that returns these; the values of the accelerator."""
        self.mirrors.begin_step()
        values = [self.accelerator.upload(Op("made"), tensor) for tensor in tensors]
        for tensor, value in zip(tensors, values, strict=True):
            self.mirrors.register(tensor, value)
        return values

    def asks(self, *tensors: Tensor) -> list[Value | None]:
        """What the next step is given at once."""
        self.mirrors.begin_step()
        return self.mirrors.returned(tensors)

    def fetches(self, *tensors: Tensor, limit_bytes: int = LIMIT) -> list[Tensor]:
        """What the accelerator has of tensors that are asked for one by one."""
        values = self.mirrors.fetch([Request(one, "cache") for one in tensors], limit_bytes)
        return [self.accelerator.download(Op("look"), value) for value in values]

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


def _other_data(tensor: Tensor) -> None:
    tensor.data = torch.zeros(2, 8)


def _unseen(tensor: Tensor) -> None:
    tensor.numpy()[:] = 0


@pytest.mark.parametrize("change", [_in_place, _other_data, _unseen])
def test_what_was_changed_is_no_answer_and_goes_up(
    steps: Steps, change: Callable[[Tensor], None], caplog: pytest.LogCaptureFixture
) -> None:
    tensor = torch.ones(2, 8)
    steps.returns(tensor)
    before = steps.uploaded
    change(tensor)
    assert steps.asks(tensor) == [None]
    with caplog.at_level(logging.WARNING):
        assert steps.fetches(tensor)[0].eq(0).all()
    assert steps.uploaded == before + 64
    told = "a tensor that a step returned was written in a way that torch does not see"
    assert (told in caplog.text) == (change is _unseen)


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
