"""The hostile CUDA accelerator against the fake of torch.cuda: delays, poison, refused pins.

It says nothing about a GPU.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.instrumented import HostileCuda, LaneDelays, RefusingCuda, hostile
from hetegen_compile import runtime
from hetegen_compile.accelerators import Op
from hetegen_compile.cost_model import load_profile
from hetegen_compile.options import parse_options
from tests.accelerators import fake_cuda
from tests.accelerators.fake_cuda import LOG
from tests.accelerators.schedules import WIDTH, SplitLayers, make_weights, run_eager


@pytest.fixture
def spins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    fake_cuda.install(monkeypatch)
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "_sleep", found.append)
    return found


def test_delays_of_a_seed_are_its_own_and_the_same_each_time() -> None:
    def drawn(seed: int) -> list[float]:
        delays = LaneDelays(seed)
        return [delays.draw_s(lane) for lane in ("up", "down", "compute", "host", "up")]

    assert drawn(3) == drawn(3)
    assert len({tuple(drawn(seed)) for seed in range(20)}) > 15
    assert max(map(max, map(drawn, range(20)))) <= 1e-3


def test_every_lane_is_delayed_and_results_stay(spins: list[int]) -> None:
    accelerator = HostileCuda()
    weights = make_weights(4)
    layers, x = SplitLayers(accelerator, weights), torch.randn(2, WIDTH)
    expected = run_eager(weights, x)
    torch.testing.assert_close(layers.step(x), expected)
    assert spins == [], "no delays without a seed"
    for seed in range(3):
        accelerator.reseed(seed)
        LOG.clear()
        torch.testing.assert_close(layers.step(x), expected)
        assert {"on up", "on down", "on own"} <= set(LOG)
    assert len(spins) >= 3 * 3 * 4, "a prefetch, a download and a launch for each layer"
    accelerator.close()


@pytest.mark.usefixtures("spins")
def test_what_is_released_is_poisoned_for_readers_that_come_too_late() -> None:
    accelerator = HostileCuda()
    accelerator.reserve_ring(1024)
    slot = accelerator.slot(0, (4,), torch.float32)
    fetched = accelerator.prefetch(Op("w"), torch.ones(4), slot, ())
    value = accelerator.wait(Op("a"), fetched)
    assert value.tolist() == [1.0] * 4
    accelerator.release(Op("r"), fetched)
    assert value.isnan().all()


@pytest.mark.usefixtures("spins")
def test_the_runtime_opens_what_it_is_given() -> None:
    with hostile(refuse_pins=True) as opened:
        options = parse_options({"accelerator": "cuda"})
        held = runtime.runtime_for(options, load_profile("cpu-emulated"))
    accelerator = held.accelerator
    assert opened == [accelerator]
    assert isinstance(accelerator, RefusingCuda)
    storage = torch.ones(4).untyped_storage()
    assert accelerator.pin(storage, storage.data_ptr(), storage.nbytes()) != 0
    assert accelerator.pinned_bytes == 0
