"""Answers that stand until something about them changes, seen through the mirrors of an emulated accelerator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hetegen_compile.accelerators import EmulatedAccelerator
from hetegen_compile.accelerators.emulated.values import DeviceTensor
from hetegen_compile.mirrors import WEIGHTS, Mirrors, NoRoomError, Request
from hetegen_compile.mirrors.fingerprints import Fingerprint
from hetegen_compile.mirrors.standing import SAMPLED_TENSORS, STEPS_PER_BLOCK, Samples, Standing

LIMIT = 1 << 20
COUNT = 5


class Weights:
    """Some weights and a standing answer for all of them."""

    def __init__(self, accelerator: EmulatedAccelerator) -> None:
        self.accelerator = accelerator
        self.mirrors = Mirrors(accelerator)
        self.tensors = [torch.randn(64, 32) for _ in range(COUNT)]
        self.mirrors.begin_step()
        values = self.mirrors.fetch(self.requests(), LIMIT)
        standing = self.mirrors.stand(self.tensors, self.requests())
        assert standing is not None
        assert standing.values == values
        self.standing: Standing = standing

    def requests(self) -> list[Request]:
        return [Request(tensor, f"w{i}", WEIGHTS, watched=True) for i, tensor in enumerate(self.tensors)]

    def stands(self) -> bool:
        """Whether the answer is right in the next step."""
        self.mirrors.begin_step()
        return self.mirrors.stands(self.standing, self.tensors)

    def fetched(self) -> list[Tensor]:
        """What an ordinary fetch brings, as host tensors."""
        values: list[DeviceTensor] = self.mirrors.fetch(self.requests(), LIMIT)
        return [value.tensor() for value in values]


@pytest.fixture
def weights(accelerator: EmulatedAccelerator) -> Weights:
    return Weights(accelerator)


def test_what_did_not_change_stands_and_moves_nothing(weights: Weights) -> None:
    moved = dict(weights.accelerator.counters.uploaded_bytes)
    assert all(weights.stands() for _ in range(40))
    assert weights.accelerator.counters.uploaded_bytes == moved == {"weights": COUNT * 64 * 32 * 4}


def _in_place(weights: Weights) -> None:
    weights.tensors[3].mul_(2)


def _other_data(weights: Weights) -> None:
    weights.tensors[3].data = torch.randn(64, 32)


def _other_tensor(weights: Weights) -> None:
    weights.tensors[3] = torch.randn(64, 32)


def _unseen(weights: Weights) -> None:
    weights.tensors[3].data += 1


def _inference_tensor(weights: Weights) -> None:
    with torch.inference_mode():
        weights.tensors[3] = torch.randn(64, 32)


def _forgotten(weights: Weights) -> None:
    weights.mirrors.forget([weights.tensors[3]])


@pytest.mark.parametrize("change", [_in_place, _other_data, _other_tensor, _unseen, _inference_tensor, _forgotten])
def test_a_change_of_one_ends_it(weights: Weights, change: Callable[[Weights], None]) -> None:
    assert weights.stands()
    change(weights)
    assert not weights.stands()
    assert all(map(torch.equal, weights.fetched(), weights.tensors))


def test_one_element_that_no_version_shows_is_found_by_a_block(weights: Weights) -> None:
    weights.tensors[3].numpy()[63, 31] += 1
    blocks = COUNT * 64 * 32 * 4 // 4096
    assert not all(weights.stands() for _ in range(blocks * STEPS_PER_BLOCK))
    assert all(map(torch.equal, weights.fetched(), weights.tensors))


def test_graphs_that_take_turns_are_searched_alike(accelerator: EmulatedAccelerator) -> None:
    """Two answers of one accelerator, each used in every other step: blocks of both are compared."""
    weights = Weights(accelerator)
    other = weights.mirrors.stand(weights.tensors, weights.requests())
    assert other is not None
    weights.tensors[3].numpy()[63, 31] += 1
    turns = COUNT * 64 * 32 * 4 // 4096 * STEPS_PER_BLOCK
    for standing in (weights.standing, other):
        samples = standing.samples
        found = []
        for _ in range(turns):
            weights.mirrors.begin_step()
            weights.mirrors.begin_step()
            found.append(samples.match())
        assert not all(found)


def test_all_of_many_tensors_have_their_turn_soon() -> None:
    """What is changed as a whole is seen in the second turn at the latest, however many windows there are."""
    tensors = [torch.randn(64) for _ in range(2 * SAMPLED_TENSORS)]
    watched = [(one.untyped_storage().data_ptr(), Fingerprint(one.untyped_storage(), 0, 256)) for one in tensors]
    for changed in (0, SAMPLED_TENSORS - 1, SAMPLED_TENSORS, 2 * SAMPLED_TENSORS - 1):
        samples = Samples(watched, turn=changed)
        before = tensors[changed].clone()
        tensors[changed].numpy()[:] += 1
        assert not (samples.match() and samples.match())
        tensors[changed].numpy()[:] = before.numpy()
        assert samples.match()


def test_every_sample_of_many_tensors_has_its_turn() -> None:
    """Whatever the number of windows: one sample of a tensor is changed, and found when all samples have had theirs."""
    tensors = [torch.randn(1024) for _ in range(16 * SAMPLED_TENSORS)]
    watched = [(one.untyped_storage().data_ptr(), Fingerprint(one.untyped_storage(), 0, 4096)) for one in tensors]
    address, fingerprint = watched[1000]  # blocks do not get that far
    place, _ = fingerprint.sample(address, 5)
    place[0] = bytes([place.raw[0] ^ 255])
    samples = Samples(watched)
    assert not all(samples.match() for _ in range(16 * Fingerprint.turns))


def test_what_died_is_let_go(weights: Weights) -> None:
    held = weights.accelerator.counters.held_bytes
    weights.tensors[3] = torch.randn(64, 32)
    weights.mirrors.begin_step()
    assert not weights.standing.valid
    assert weights.standing.values == []
    assert held["weights"] == (COUNT - 1) * 64 * 32 * 4


def test_what_stands_is_in_use(weights: Weights) -> None:
    """A mirror that an answer stands on is not dropped to make room in the step that uses it, but in a later one."""
    other = [Request(torch.randn(64, 32), "other")]
    assert weights.stands()
    with pytest.raises(NoRoomError):
        weights.mirrors.fetch(other, COUNT * 64 * 32 * 4)
    assert weights.standing.valid
    weights.mirrors.begin_step()
    weights.mirrors.fetch(other, COUNT * 64 * 32 * 4)
    assert not weights.standing.valid


def test_tensors_of_inference_mode_never_stand(accelerator: EmulatedAccelerator) -> None:
    mirrors = Mirrors(accelerator)
    with torch.inference_mode():
        tensor = torch.randn(4)
    mirrors.begin_step()
    requests: list[Any] = [Request(tensor, "x")]
    mirrors.fetch(requests, LIMIT)
    assert mirrors.stand([tensor], requests) is None
