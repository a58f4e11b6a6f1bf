"""The emulated accelerator computes what eager computes, however its streams are delayed."""

import pytest
import torch

from hetegen_compile.accelerators import EmulatedAccelerator, Op
from hetegen_compile.ir import SMALL_UPLOAD_BYTES
from tests.accelerators.schedules import HOST_ROWS, WIDTH, SplitLayers, make_weights, run_eager

LAYERS = 6


@pytest.mark.parametrize("seed", range(20))
def test_split_layers_equal_eager_under_random_delays(seed: int) -> None:
    accelerator = EmulatedAccelerator(seed=seed)
    weights = make_weights(LAYERS)
    layers = SplitLayers(accelerator, weights)
    for step in range(2):
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step))
        torch.testing.assert_close(layers.step(x), run_eager(weights, x))
    streamed = (WIDTH - HOST_ROWS) * WIDTH * 4
    assert accelerator.counters.uploaded_bytes["weights"] == 2 * LAYERS * streamed
    accelerator.close()


def test_upload_is_a_copy(accelerator: EmulatedAccelerator) -> None:
    source = torch.arange(4.0)
    value = accelerator.upload(Op("x"), source)
    source.zero_()
    result = accelerator.download(Op("out"), value)
    assert result.tolist() == [0, 1, 2, 3]
    result.zero_()
    assert accelerator.download(Op("again"), value).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "source",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(12.0).view(3, 4)[:, 1:3],
        torch.arange(3.0).expand(4, 3),
        torch.tensor(5),
        torch.empty(0, 7),
        torch.ones(2, 3, dtype=torch.bool),
    ],
    ids=["transposed", "gapped", "expanded", "scalar", "empty", "bool"],
)
def test_copies_keep_the_geometry(accelerator: EmulatedAccelerator, source: torch.Tensor) -> None:
    result = accelerator.download(Op("out"), accelerator.upload(Op("x"), source))
    assert torch.equal(result, source)
    assert (result.stride(), result.dtype) == (source.stride(), source.dtype)


def test_upload_into_overwrites_in_place(accelerator: EmulatedAccelerator) -> None:
    value = accelerator.upload(Op("x"), torch.zeros(4))
    held = dict(accelerator.counters.held_bytes)
    assert accelerator.upload(Op("x2"), torch.ones(4), into=value) is value
    assert accelerator.download(Op("out"), value).tolist() == [1, 1, 1, 1]
    assert accelerator.counters.held_bytes == held


def test_views_and_in_place_results_alias(accelerator: EmulatedAccelerator) -> None:
    value = accelerator.upload(Op("cache"), torch.zeros(4))
    view = accelerator.launch(Op("view"), torch.Tensor.narrow, (value, 0, 1, 2))
    same = accelerator.launch(Op("add"), torch.Tensor.add_, (view, 3), mutates=(0,))
    assert accelerator.download(Op("out"), value).tolist() == [0, 3, 3, 0]
    assert accelerator.download(Op("same"), same).tolist() == [3, 3]
    assert accelerator.counters.held_bytes == {"activations": 16}


def test_launch_with_several_outputs(accelerator: EmulatedAccelerator) -> None:
    value = accelerator.upload(Op("x"), torch.arange(6.0))
    parts = accelerator.launch(Op("split"), lambda t: (t[:2], 7, t[2:]), (value,), outputs=3)
    total = accelerator.launch(Op("sum"), lambda ts, n: ts[0].sum() + ts[1].sum() + n, ([parts[0], parts[2]], 7))
    assert accelerator.download(Op("out"), total).item() == 22


def test_only_large_activations_go_through_the_up_stream(accelerator: EmulatedAccelerator) -> None:
    lent, small, large = 1, SMALL_UPLOAD_BYTES // 4096, SMALL_UPLOAD_BYTES // 4096 + 1
    for rows, resource in ((lent, None), (small, "accelerator"), (large, "up")):
        x = torch.randn(rows, 1024)
        accelerator.trace(True)
        (value,) = accelerator.wait(Op("w"), accelerator.to_accelerator(Op("up"), [x]))
        total = accelerator.launch(Op("sum"), torch.sum, (value,))
        torch.testing.assert_close(accelerator.download(Op("out"), total), x.sum())
        accelerator.synchronize()
        spans = {span.name: span.resource for span in accelerator.trace(False)}
        assert spans.get("up") == resource


def test_released_slots_hold_nan(accelerator: EmulatedAccelerator) -> None:
    accelerator.reserve_ring(1024)
    slot = accelerator.slot(256, (4,), torch.float32)
    fetched = accelerator.prefetch(Op("w"), torch.ones(4), slot, ())
    view = accelerator.launch(Op("view"), lambda t: t[:2], (accelerator.wait(Op("ww"), fetched),))
    assert accelerator.download(Op("before"), view).tolist() == [1, 1]
    accelerator.release(Op("r"), fetched)
    assert accelerator.download(Op("after"), view).isnan().all()


def test_bytes_never_prefetched_are_nan(accelerator: EmulatedAccelerator) -> None:
    accelerator.reserve_ring(512)
    assert accelerator._prefetches.ring.buffer.view(torch.bfloat16).isnan().all()


def test_slots_survive_a_growing_ring(accelerator: EmulatedAccelerator) -> None:
    accelerator.reserve_ring(256)
    slot = accelerator.slot(0, (2,), torch.float32)
    accelerator.reserve_ring(4096)
    fetched = accelerator.prefetch(Op("w"), torch.ones(2), slot, ())
    value = accelerator.wait(Op("ww"), fetched)
    assert accelerator.download(Op("out"), value).tolist() == [1, 1]
    assert accelerator.counters.held_bytes["slots"] == 4096


def test_several_values_go_down_as_one_transfer(accelerator: EmulatedAccelerator) -> None:
    values = [accelerator.upload(Op("x"), torch.full((2,), float(i))) for i in range(3)]
    transfer = accelerator.to_host(Op("down"), values)
    results = accelerator.wait_host(Op("arrived"), transfer)
    assert [result.tolist() for result in results] == [[0, 0], [1, 1], [2, 2]]
    assert accelerator.wait_host(Op("one"), accelerator.to_host(Op("down"), values[:1]))[0].tolist() == [0, 0]
    assert accelerator.counters.downloaded_bytes == {"activations": 32}


def test_one_tokens_strides_are_usual_where_torchs_operations_are_launched(
    accelerator: EmulatedAccelerator,
) -> None:
    """With those that attention leaves its bfloat16 Linear takes up to 60 times as long; segments get what there is."""
    seen: list[tuple[int, ...]] = []

    def single(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.stride())
        return x + 1

    def segment(x: torch.Tensor) -> list[torch.Tensor]:
        return [single(x)]

    value = accelerator.upload(Op("x"), torch.randn(64).as_strided((1, 1, 64), (64, 8, 1)))
    accelerator.download(Op("one"), accelerator.launch(Op("single"), single, (value,)))
    accelerator.download(Op("other"), accelerator.launch(Op("segment"), segment, (value,), outputs=1)[0])
    assert seen == [(64, 64, 1), (64, 8, 1)]
