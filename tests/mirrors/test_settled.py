"""What steps write on both sides: one answer for all of it, which the steps themselves keep right."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hetegen_compile.accelerators import EmulatedAccelerator, Op
from hetegen_compile.mirrors import Mirrors, Request
from hetegen_compile.mirrors.settled import Settled

LIMIT = 1 << 20


class Caches:
    """Steps that add one to each of some caches, on both sides."""

    def __init__(self, accelerator: EmulatedAccelerator) -> None:
        self.accelerator = accelerator
        self.mirrors = Mirrors(accelerator)
        self.tensors = [torch.zeros(2, 8), torch.zeros(3), torch.zeros(1, dtype=torch.long)]
        self.settled: Settled | None = None

    def fetch(self) -> list[object]:
        """What the next step is given; asked for one by one where no answer stands."""
        self.mirrors.begin_step()
        if self.settled is not None and self.mirrors.stands(self.settled, self.tensors):
            return self.settled.values
        return self.mirrors.fetch([Request(one, f"cache {i}") for i, one in enumerate(self.tensors)], LIMIT)

    def step(self) -> None:
        """Write them all."""
        self.accelerator.begin_step()
        values = self.fetch()
        for value, tensor in zip(values, self.tensors, strict=True):
            self.accelerator.launch(Op("write"), lambda x: x.add_(1), (value,), mutates=(0,))
            tensor.add_(1)
        self.accelerator.end_step()
        self.settled = self.mirrors.settle(self.tensors, self.settled)

    def uploads(self) -> int:
        return self.accelerator.counters.uploaded_bytes.get("mirrors", 0)

    def held(self) -> list[Tensor]:
        """What the accelerator has of them, asked for one by one."""
        self.mirrors.begin_step()
        values = self.mirrors.fetch([Request(one, f"cache {i}") for i, one in enumerate(self.tensors)], LIMIT)
        return [self.accelerator.download(Op("look"), value) for value in values]


@pytest.fixture
def caches(accelerator: EmulatedAccelerator) -> Caches:
    caches = Caches(accelerator)
    for _ in range(3):
        caches.step()
    return caches


def test_steps_in_a_row_are_answered_at_once(caches: Caches, monkeypatch: pytest.MonkeyPatch) -> None:
    before, settled = caches.uploads(), caches.settled
    monkeypatch.setattr(caches.mirrors, "fetch", None)
    for _ in range(5):
        caches.step()
    assert caches.settled is settled is not None
    assert caches.uploads() == before


def test_who_asks_for_one_of_them_finds_it_as_the_steps_left_it(caches: Caches) -> None:
    """Another plan is given what no record has been told of; nothing goes up for it."""
    before = caches.uploads()
    assert [one.flatten()[0].item() for one in caches.held()] == [3, 3, 3]
    assert caches.uploads() == before
    assert caches.settled is not None
    assert not caches.settled.valid, "what the other plan may do with it is not this answer's"
    for _ in range(2):
        caches.step()
    assert caches.uploads() == before
    assert [one.flatten()[0].item() for one in caches.held()] == [5, 5, 5]


def _in_place(caches: Caches) -> None:
    caches.tensors[1].zero_()


def _other_tensor(caches: Caches) -> None:
    caches.tensors[1] = torch.zeros(3)


def _other_data(caches: Caches) -> None:
    caches.tensors[1].data = torch.zeros(3)


def _unseen(caches: Caches) -> None:
    caches.tensors[1].numpy()[:] = 0


@pytest.mark.parametrize("change", [_in_place, _other_tensor, _other_data, _unseen])
@pytest.mark.parametrize("others_ask", [False, True])
def test_what_was_changed_goes_up_again(
    caches: Caches, change: Callable[[Caches], None], *, others_ask: bool, caplog: pytest.LogCaptureFixture
) -> None:
    change(caches)
    before = caches.uploads()
    with caplog.at_level(logging.WARNING):
        if others_ask:
            assert [one.flatten()[0].item() for one in caches.held()] == [3, 0, 3]
        caches.step()
    assert caches.uploads() > before
    assert ("cache 1 was written in a way that torch does not see" in caplog.text) == (change is _unseen)
    assert [one.flatten()[0].item() for one in caches.held()] == [4, 1, 4]


def test_what_died_is_let_go(caches: Caches) -> None:
    settled = caches.settled
    caches.tensors = [*caches.tensors[:2], torch.zeros(1, dtype=torch.long)]
    caches.mirrors.begin_step()
    assert settled is not None
    assert not settled.valid
    assert settled.values == []
    caches.step()
    assert [one.flatten()[0].item() for one in caches.held()] == [4, 4, 1]


def test_what_a_failed_step_may_have_written_is_forgotten(caches: Caches) -> None:
    settled = caches.settled
    caches.mirrors.forget(caches.tensors)
    assert settled is not None
    assert not settled.valid
    before = caches.uploads()
    caches.step()
    assert caches.uploads() > before


def test_a_step_that_was_answered_one_by_one_makes_a_new_answer(caches: Caches) -> None:
    settled = caches.settled
    caches.accelerator.begin_step()
    caches.mirrors.begin_step()  # of a step that did not ask for the answer
    caches.accelerator.end_step()
    assert caches.mirrors.settle(caches.tensors, settled) is not settled


def test_tensors_of_inference_mode_are_never_answered_for(accelerator: EmulatedAccelerator) -> None:
    caches = Caches(accelerator)
    with torch.inference_mode():
        caches.tensors = [torch.zeros(2)]
    caches.fetch()
    assert caches.mirrors.settle(caches.tensors) is None


def test_a_longer_view_of_the_same_memory_is_another_tensor(accelerator: EmulatedAccelerator) -> None:
    """Its address, version and first bytes are the same."""
    caches, buffer = Caches(accelerator), torch.zeros(8)
    for length in (2, 2, 2, 3, 3, 5, 2):
        caches.tensors = [buffer[:length]]
        caches.step()
        (held,) = caches.held()
        assert torch.equal(held, buffer[:length])


def test_views_that_are_made_anew_each_time_are_known_to_others(accelerator: EmulatedAccelerator) -> None:
    caches, both = Caches(accelerator), torch.zeros(2, 8)
    for _ in range(3):
        caches.tensors = [both[0], both[1]]
        caches.step()
    before = caches.uploads()
    caches.tensors = [both[0], both[1]]
    assert [one[0].item() for one in caches.held()] == [3, 3]
    assert caches.uploads() == before


def test_one_that_is_replaced_goes_up_alone(caches: Caches, caplog: pytest.LogCaptureFixture) -> None:
    before = caches.uploads()
    caches.tensors[1] = torch.zeros(3)
    caches.step()
    assert caches.uploads() == before + caches.tensors[1].nbytes
    assert not caplog.text


def test_a_view_whose_owner_lies_in_less_memory_is_forgotten(accelerator: EmulatedAccelerator) -> None:
    """The view cannot be made again there; nothing is raised out of a later step."""
    caches = Caches(accelerator)
    owner = torch.zeros(8, 8)
    caches.tensors = [owner.view(4, 16), torch.zeros(3)]
    for _ in range(3):
        caches.step()
    assert caches.settled is not None
    owner.data = torch.zeros(2, 2)
    caches.tensors = [torch.zeros(4, 16), caches.tensors[1]]
    caches.mirrors.check()
    assert [one.flatten()[0].item() for one in caches.held()] == [0, 3]
