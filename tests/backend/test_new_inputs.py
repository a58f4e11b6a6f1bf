"""Small inputs that are new in a step: uploaded for that step only, in the budget, right whatever they share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hetegen_compile.runtime import live_runtimes
from tests.backend.modules import BUDGET, Linear, Mlp, around, random
from tests.models.harness import RecordingBackend, emulated


def test_small_inputs_that_are_new_are_uploaded_for_one_step() -> None:
    """Their own bytes, also of parts of something longer, and nothing is noted; what the first step was given is."""
    torch.manual_seed(0)
    model, wide = Mlp().eval(), random(16, 64)
    backend = RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=BUDGET), dynamic=False)
    with torch.no_grad():
        first = random(2, 64, seed=9)
        model(first)
        (mirrors,) = [one.mirrors for one in live_runtimes() if one.accelerator is backend.accelerator]
        counters = backend.accelerator.counters
        assert mirrors.knows(first)
        for x in (random(2, 64, seed=1), wide[3:5], random(2, 64, seed=2), wide[3:5]):
            before = counters.uploaded_bytes["mirrors"]
            torch.testing.assert_close(model(x), Mlp.forward(model, x))
            assert counters.uploaded_bytes["mirrors"] - before == x.numel() * 4
            assert not mirrors.knows(x)
        again = random(2, 64, seed=3)
        moved = []
        for _ in range(4):  # what is given again after all is noted then
            before = counters.uploaded_bytes["mirrors"]
            model(again)
            moved.append(counters.uploaded_bytes["mirrors"] - before)
        assert moved == [again.nbytes, again.nbytes, 0, 0]


def test_room_is_made_for_small_inputs_that_are_new() -> None:
    """Those of earlier steps, which the caller still has, leave; neither the budget nor what is resident shrinks."""

    def body(before: Linear, after: Linear, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(after(before(x)), weight)

    model, backend = around(body), RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=40 << 10), dynamic=False)
    given = [(random(2, 64, seed=i), random(16, 64, seed=i + 99)) for i in range(8)]
    found = []
    with torch.no_grad():
        for inputs in given:
            torch.testing.assert_close(model(*inputs), model.forward(*inputs))
            schedule = backend.graphs[0].plans[-1].schedule
            found.append((schedule.budget_bytes, schedule.resident_bytes))
    assert found[-1][1] > 0
    assert set(found) == {found[0]}


def test_a_small_view_with_gaps_moves_its_storage_once() -> None:
    """From its first to its last element lies much that a copy would move in each step."""
    model, backend = around(lambda before, after, x: after(before(x))), RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=4 << 20), dynamic=False)
    moved = []
    with torch.no_grad():
        for wide in (random(8, 1 << 14, seed=1), *[random(8, 1 << 14, seed=2)] * 3):
            x = wide[:, :64]
            torch.testing.assert_close(model(x), model.forward(x))
            moved.append(backend.accelerator.counters.uploaded_bytes["mirrors"])
    assert moved[3] == moved[1] > moved[0] > 8 << 14


def test_a_new_view_of_what_the_step_writes_shows_the_write() -> None:
    """Two inputs turn out to be one storage, which Dynamo does not guard."""

    def body(before: Linear, after: Linear, x: Tensor, y: Tensor) -> Tensor:
        x.add_(after(before(x)))
        return torch.relu(y) * 2 + before(x)

    model, backend = around(body), RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=200 << 10, split=0.25), dynamic=False)
    with torch.no_grad():
        for seed in (1, 2):
            inputs = random(2, 64, seed=seed), random(2, 64, seed=seed + 9)
            expected = model.forward(*[one.clone() for one in inputs])
            torch.testing.assert_close(model(*inputs), expected)
        shared, twin = random(2, 64, seed=3), random(2, 64, seed=3)
        torch.testing.assert_close(model(shared[:], shared.view(2, 64)), model.forward(twin[:], twin.view(2, 64)))
