"""Caches that grow where they lie: values, where results lie, who gets what lies behind a cache, when memory ends."""

from __future__ import annotations

import copy
import gc
import io
import mmap
import sys
import threading
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hetegen_compile.host_memory import growing
from hetegen_compile.host_memory.growing import Block, append
from hetegen_compile.passes.append_tokens import append_tokens, lies_by_token

NOTHING = torch.tensor([])


def tokens(number: int, sequences: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sequences, 3, number, 4).to(dtype)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8), st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    st.integers(1, 3), st.booleans(),
)  # fmt: skip
def test_it_is_cat_laid_out_token_by_token(lengths: list[int], dtype: torch.dtype, sequences: int, moved: bool) -> None:
    parts = [tokens(number, sequences, dtype) for number in lengths]
    if moved:
        parts = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
    cache, plain = NOTHING.to(dtype), NOTHING.to(dtype)
    for end, part in enumerate(parts, 1):
        cache, plain = append(cache, part), append_tokens(plain, part)
        assert torch.equal(cache, torch.cat(parts[:end], -2))
        assert torch.equal(plain, cache)
        assert cache.dtype is dtype
        if cache.numel():
            assert (cache._base, cache.is_inference()) == (None, False)
            assert lies_by_token(cache)
            assert lies_by_token(plain)
            assert cache.stride() == plain.stride()
            assert cache.untyped_storage().nbytes() == cache.nbytes


def test_what_is_new_goes_behind_what_is_there() -> None:
    cache = append(NOTHING, tokens(100))
    first, expected = cache.data_ptr(), cache.clone()
    for _ in range(100):
        new = tokens(1)
        cache, expected = append(cache, new), torch.cat([expected, new], -2)
        assert cache.data_ptr() == first
    assert torch.equal(cache, expected)


def test_one_that_outgrows_its_block_is_copied_and_has_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "LEAST_ROOM_BYTES", 1)
    cache = append(NOTHING, tokens(4))
    expected, places = cache.clone(), [cache.data_ptr()]
    for _ in range(60):
        new = tokens(1)
        cache, expected = append(cache, new), torch.cat([expected, new], -2)
        places.append(cache.data_ptr())
    assert torch.equal(cache, expected)
    assert sum(one != other for one, other in pairwise(places)) == 3, "behind 8, 18 and 38: room for as many again"


def test_a_cache_that_two_grow_from_is_shared_and_what_is_new_is_not() -> None:
    """A prompt that several answers start from; the same for one that is cut and goes on otherwise."""
    prompt = append(NOTHING, tokens(10))
    kept = prompt.clone()
    one, other = append(prompt, tokens(1)), append(prompt, tokens(1))
    assert one.data_ptr() == prompt.data_ptr() != other.data_ptr()
    assert torch.equal(one[:, :, :10], kept)
    assert torch.equal(other[:, :, :10], kept)
    assert not torch.equal(one, other)
    cut = one[:, :, :5]
    blocks, before = set(growing._blocks), one.clone()
    longer = append(cut, tokens(3))
    assert set(growing._blocks) == blocks, "what is cut in each step is not given a block in each"
    assert (longer._base, lies_by_token(longer)) == (None, True)
    assert torch.equal(one, before)
    assert torch.equal(longer[:, :, :5], cut)
    assert torch.equal(prompt, kept)


@pytest.mark.parametrize("dims", [(1, 0, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)])
def test_a_view_of_a_cache_that_lies_otherwise_is_copied(dims: tuple[int, ...]) -> None:
    """It begins where the cache begins and ends where it ends, and is not laid out token by token."""
    cache = append(NOTHING, torch.randn(2, 3, 4, 5))
    view, kept = cache.permute(dims), cache.clone()
    new = torch.randn(*view.shape[:2], 1, view.shape[3])
    longer = append(view, new)
    assert longer.data_ptr() != cache.data_ptr()
    assert torch.equal(longer, torch.cat([view, new], -2))
    assert lies_by_token(longer)
    assert torch.equal(append(cache, new := tokens(1)[:, :, :, :1].expand(-1, -1, -1, 5)), torch.cat([kept, new], -2))


def test_of_threads_that_grow_one_cache_each_gets_its_own() -> None:
    faults: list[int] = []
    previous = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for turn in range(200):
            prompt = append(NOTHING, tokens(3))
            start = threading.Barrier(3)
            found: dict[int, Tensor] = {}

            def work(number: int, prompt: Tensor = prompt, start: threading.Barrier = start,
                     found: dict[int, Tensor] = found) -> None:  # fmt: skip
                start.wait()
                found[number] = append(prompt, torch.full((2, 3, 1, 4), float(number)))

            threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            faults += [turn for number, one in found.items() if not bool((one[:, :, 3:] == number).all())]
            assert len(found) == 3
    finally:
        sys.setswitchinterval(previous)
    assert not faults


def test_memory_ends_with_the_last_tensor_in_it() -> None:
    gc.collect()
    before = set(growing._blocks)
    cache = append(append(NOTHING, tokens(10)), tokens(1))
    view = cache[:, :, 2:]
    (address,) = set(growing._blocks) - before
    del cache
    assert address in growing._blocks
    assert bool(torch.isfinite(view).all())
    del view
    assert set(growing._blocks) <= before


def test_room_takes_no_memory() -> None:
    """Pages in which nothing has lain are not there."""

    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * mmap.PAGESIZE

    new, before = torch.ones(1, 1, 1 << 14, 1 << 10), resident()
    cache = append(NOTHING, new)
    assert len(growing._blocks[cache.data_ptr()]) >= 2 * cache.nbytes
    assert cache.nbytes <= resident() - before + (1 << 22)
    assert resident() - before < 1.2 * cache.nbytes


def test_results_are_copied_pickled_and_cut_as_others() -> None:
    cache = append(NOTHING, tokens(5))
    file = io.BytesIO()
    torch.save(cache, file)
    assert len(file.getvalue()) < cache.nbytes + 4096
    file.seek(0)
    for one in (copy.deepcopy(cache), torch.load(file, weights_only=True)):
        assert torch.equal(one, cache)
        new = tokens(1)
        assert torch.equal(append(one, new), torch.cat([cache, new], -2))
    selected = cache.index_select(0, torch.tensor([1, 0]))
    assert torch.equal(append(selected, tokens(1))[:, :, :5], cache.flip(0))


def test_in_inference_mode_results_are_made_in_it() -> None:
    with torch.inference_mode():
        cache = append(append(NOTHING, tokens(2)), tokens(1))
        assert cache.is_inference()
        assert cache.shape == (2, 3, 3, 4)


def test_other_types_are_torchs() -> None:
    mixed = append(tokens(2), tokens(1, dtype=torch.float64))
    assert (mixed.dtype, mixed.shape) == (torch.float64, (2, 3, 3, 4))


def test_without_memory_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> Block:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(Block, "of", refused)
    new = tokens(2)
    assert torch.equal(append(NOTHING, new), new)
