"""Memory of caches that grow: where results lie, when a block is lent again, and that results are torch's own."""

from __future__ import annotations

import gc
import mmap
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hetegen_compile.host_memory import recycled
from hetegen_compile.host_memory.recycled import Recycled

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycled, "LEAST_BYTES", 1)


def address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def test_a_block_is_lent_again_once_nothing_lies_in_it() -> None:
    memory = Recycled()
    other, view = memory.lend(MIB), memory.lend(MIB)
    first = address(view)
    assert address(other) != first
    assert address(memory.lend(MIB)) not in (address(other), first)
    del view
    assert address(memory.lend(MIB + MIB // 8)) == first, "a little longer: it still fits"


def test_what_is_idle_is_never_much_more_than_what_is_lent() -> None:
    memory = Recycled()
    views = [memory.lend(MIB) for _ in range(8)]
    block = memory.lent_bytes // 8
    assert MIB < block < 2 * MIB
    for idle in (1, 2, 3, 4, 3, 2, 1, 0):
        views.pop()
        assert memory.lent_bytes == block * len(views)
        assert memory.idle_bytes == block * idle
    assert not views


def test_blocks_that_became_too_small_make_room_for_longer_ones() -> None:
    memory = Recycled()
    views = [memory.lend(MIB) for _ in range(8)]
    del views[4:]
    assert memory.idle_bytes == memory.lent_bytes
    longer = memory.lend(3 * MIB)
    assert len(longer) == 3 * MIB
    assert memory.idle_bytes <= 1.25 * MIB, "three of four"


def test_the_smallest_that_fits_is_taken() -> None:
    memory = Recycled()
    held = memory.lend(16 * MIB)
    large, small = memory.lend(8 * MIB), memory.lend(MIB)
    at = address(small)
    del large, small
    assert address(memory.lend(MIB)) == at
    del held


def test_a_view_that_ends_while_the_lock_is_taken_is_taken_back_by_the_next_call() -> None:
    memory = Recycled()
    held, view = memory.lend(MIB), memory.lend(MIB)
    at = address(view)
    with memory._lock:
        del view  # as the garbage collector may do within ``lend``
        assert memory.idle_bytes == 0
    assert address(memory.lend(MIB)) == at
    del held


def test_no_two_tensors_share_a_block_whatever_threads_do() -> None:
    memory = Recycled()
    faults: list[str] = []

    def work(number: int) -> None:
        held: list[Tensor] = []
        for turn in range(300):
            part = torch.full((1, 1, 40 + turn % 7, 4), 1000.0 * number + turn)
            held.append(recycled.cat([part, part], 2, memory=memory))
            held = held[-(1 + turn % 5) :]
            for back, tensor in enumerate(reversed(held)):
                if not bool((tensor == 1000.0 * number + turn - back).all()):
                    faults.append(f"{number}: {turn} - {back}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    gc.collect()
    assert (memory.lent_bytes, memory.idle_bytes) == (0, 0)


def test_a_tensor_on_a_part_of_a_result_keeps_all_of_it() -> None:
    memory = Recycled()
    result = recycled.cat([torch.ones(2, 3, 4, 8), torch.ones(2, 3, 1, 8)], 2, memory=memory)
    window = result[:, :, 1:]
    del result
    other = recycled.cat([torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 1, 8)], 2, memory=memory)
    assert bool((window == 1).all())
    assert bool((other == 0).all())


@st.composite
def _tensors(draw: st.DrawFn) -> tuple[list[Tensor], int]:
    """What may be concatenated, of any layout."""
    dims = draw(st.integers(1, 5))
    dim = draw(st.integers(-dims, dims - 1))
    shape = draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
    order = draw(st.permutations(range(dims)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
    tensors = []
    for _ in range(draw(st.integers(1, 3))):
        shape[dim] = draw(st.integers(1, 4))
        tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
        if draw(st.booleans()):
            tensor = tensor.permute(order).contiguous().permute([order.index(i) for i in range(dims)])
        if draw(st.booleans()) and dims in (4, 5):
            tensor = tensor.contiguous(memory_format=torch.channels_last if dims == 4 else torch.channels_last_3d)
        tensors.append(tensor)
    return tensors, dim


@given(_tensors())
def test_results_are_torchs(drawn: tuple[list[Tensor], int]) -> None:
    tensors, dim = drawn
    expected, found = torch.cat(tensors, dim), recycled.cat(tensors, dim)
    assert torch.equal(found, expected)
    assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert found.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    assert (found.storage_offset(), found._base, found.is_inference()) == (0, None, False)


@pytest.mark.parametrize(
    ("others", "dim"),
    [
        ([torch.ones(1, 2, 1, 4, dtype=torch.float64)], 2),  # promotion
        ([torch.empty(0)], 2),  # torch passes over these
        ([torch.ones(1, 2, 1, 5)], 3),
    ],
)
def test_anything_else_is_torchs(others: list[Tensor], dim: int) -> None:
    tensors = [torch.ones(1, 2, 1, 4), *others]
    torch.testing.assert_close(recycled.cat(tensors, dim), torch.cat(tensors, dim), rtol=0, atol=0)


def test_what_torch_refuses_is_refused_in_its_words() -> None:
    memory = Recycled()
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        recycled.cat([torch.ones(1, 2, 1, 4), torch.ones(1, 3, 1, 4)], 2, memory=memory)
    with pytest.raises(IndexError, match="Dimension out of range"):
        recycled.cat([torch.ones(1, 2, 1, 4)], 4, memory=memory)
    assert memory.lent_bytes == 0


def test_small_results_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycled, "LEAST_BYTES", 1 << 10)
    memory = Recycled()
    large, small = torch.ones(1, 1, 16, 16), torch.ones(1, 1, 15, 16)
    results = [recycled.cat([one, one[:, :, :1]], 2, memory=memory) for one in (large, small)]
    assert memory.lent_bytes == (17 * 64) * 5 // 4
    del results


def test_in_inference_mode_results_are_made_in_it() -> None:
    with torch.inference_mode():
        assert recycled.cat([torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 4)], 2).is_inference()


def test_without_memory_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refused)
    memory = Recycled()
    assert recycled.cat([torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 4)], 2, memory=memory).shape == (1, 1, 5, 4)
    assert memory.lent_bytes == 0


def test_nothing_keeps_a_result_alive() -> None:
    result = recycled.cat([torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 4)], 2)
    reference = weakref.ref(result)
    del result
    assert reference() is None
