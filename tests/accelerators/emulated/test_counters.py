"""Bytes held and moved, by category, and the budget."""

import gc

import pytest
import torch

from hetegen_compile.accelerators import EmulatedAccelerator, Op
from hetegen_compile.errors import AcceleratorMemoryError

KIB = 1024


def test_moved_bytes_by_category(accelerator: EmulatedAccelerator) -> None:
    accelerator.reserve_ring(4 * KIB)
    slot = accelerator.slot(0, (KIB,), torch.float32)
    value = accelerator.upload(Op("w", category="weights"), torch.ones(KIB))
    accelerator.upload(Op("w2", category="mirrors"), torch.zeros(KIB), into=value)
    accelerator.prefetch(Op("fetch", category="weights"), torch.ones(KIB), slot, ())
    accelerator.to_accelerator(Op("small"), [torch.ones(1)])
    accelerator.to_accelerator(Op("large"), [torch.ones(64 * KIB)])
    accelerator.download(Op("down", category="results"), value)
    accelerator.synchronize()
    counters = accelerator.counters
    assert counters.uploaded_bytes == {"weights": 8 * KIB, "mirrors": 4 * KIB, "activations": 256 * KIB + 4}
    assert counters.downloaded_bytes == {"results": 4 * KIB}


def test_held_bytes_follow_the_life_of_values(accelerator: EmulatedAccelerator) -> None:
    accelerator.reserve_ring(KIB)
    weight = accelerator.upload(Op("w", category="weights"), torch.ones(KIB))
    result = accelerator.launch(Op("neg"), torch.neg, (weight,))
    view = accelerator.launch(Op("view"), torch.Tensor.narrow, (result, 0, 0, 2))
    accelerator.synchronize()
    held = accelerator.counters.held_bytes
    assert held == {"slots": KIB, "weights": 4 * KIB, "activations": 4 * KIB}
    del result
    gc.collect()
    assert held["activations"] == 4 * KIB  # the view still holds it
    del view
    assert held["activations"] == 0
    del weight
    assert held == {"slots": KIB, "weights": 0, "activations": 0}
    assert accelerator.counters.peak_bytes == 9 * KIB


def test_small_activations_are_the_hosts_memory(accelerator: EmulatedAccelerator) -> None:
    (small,) = accelerator.wait(Op("wait"), accelerator.to_accelerator(Op("up"), [torch.ones(4)]))
    same = accelerator.launch(Op("view"), torch.Tensor.view, (small, 2, 2))
    assert accelerator.download(Op("out"), same).sum().item() == 4
    assert accelerator.counters.peak_bytes == 0


def test_uploads_stay_inside_the_memory() -> None:
    accelerator = EmulatedAccelerator(8 * KIB)
    value = accelerator.upload(Op("first"), torch.ones(KIB))
    with pytest.raises(AcceleratorMemoryError, match=r"second needs 8192 bytes, 4096 of 8192"):
        accelerator.upload(Op("second"), torch.ones(2 * KIB))
    with pytest.raises(AcceleratorMemoryError, match=r"ring needs 5120 bytes, 4096 of 8192"):
        accelerator.reserve_ring(5 * KIB)
    del value
    accelerator.reserve_ring(5 * KIB)
    assert accelerator.counters.held_bytes["slots"] == 5 * KIB
    accelerator.close()


def test_pins_end_with_the_storage(accelerator: EmulatedAccelerator) -> None:
    weight = torch.ones(KIB)
    view = weight[8:16]
    for tensor in (view, weight):
        storage = tensor.untyped_storage()
        assert accelerator.pin(storage, storage.data_ptr(), storage.nbytes()) == 0
    del tensor, storage
    assert accelerator.pinned_bytes == 4 * KIB
    del weight
    assert accelerator.pinned_bytes == 4 * KIB
    del view
    assert accelerator.pinned_bytes == 0


def test_a_finished_operation_holds_nothing() -> None:
    accelerator = EmulatedAccelerator()
    for _ in range(200):
        value = accelerator.launch(Op("ones"), torch.ones, (KIB,))
        transfer = accelerator.to_host(Op("down"), value)
        del value
        accelerator.wait_host(Op("arrived"), transfer)
        assert accelerator.counters.held_bytes["activations"] == 0
    accelerator.close()


def test_what_an_operation_takes_while_it_runs_counts(accelerator: EmulatedAccelerator) -> None:
    accelerator.begin_step()
    value = accelerator.upload(Op("x"), torch.ones(KIB))
    accelerator.launch(Op("neg", workspace_bytes=5 * KIB), torch.neg, (value,))
    accelerator.end_step()
    counters = accelerator.counters
    assert counters.peak_bytes == counters.step_peak_bytes == (4 + 4 + 5) * KIB
