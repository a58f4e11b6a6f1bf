"""Chunks that tile the staging ring, and how much of the ring is used."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.choose_residency import SLOT_ALIGNMENT
from hetegen_compile.passes.fit_ring import LEAST_USED, _Cutter, fit_ring
from hetegen_compile.passes.plans import LinearPlan
from hetegen_compile.passes.schedule import shortest_ring
from tests.passes.graphs import Case, again, planned, property_test

GRANULE = 64 * 256 * 4  # bytes of the rows that a split is aligned to
LAYERS = nn.ModuleList([nn.Linear(256, 1024, bias=False) for _ in range(2)])
"""Weights of 1 MiB, granules of 64 KiB."""


def both(x: Tensor) -> Any:
    return LAYERS[1](LAYERS[0](x)[:, :256])


@pytest.fixture(scope="module")
def base() -> Case:
    return planned(both, torch.zeros(1, 256))


def fitted(base: Case, shares: list[int], ring_bytes: int, chunk_bytes: int) -> list[tuple[LinearPlan, LinearPlan]]:
    """Each plan before and after; ``shares`` in granules of 64 rows on the host."""
    assert base.context.residency is not None
    residency = replace(base.context.residency, ring_bytes=ring_bytes, chunk_bytes=chunk_bytes)
    found = again(base, residency=residency)
    positions = [info(node).position for node in found.nodes(LINEAR)]
    plans = [LinearPlan(1024, 64 * n, ((64 * n, 1024),) if n < 16 else (), None) for n in shares]
    splits = dict(zip(positions, plans, strict=True))
    after = fit_ring(found.module, splits, found.context)
    return [(splits[position], after[position]) for position in positions]


def test_chunks_may_be_of_another_part_of_the_ring(base: Case) -> None:
    ring_bytes = 16 * GRANULE
    assert base.context.residency is not None
    residency = replace(base.context.residency, ring_bytes=ring_bytes, chunk_bytes=ring_bytes // 2)
    found = again(base, residency=residency)
    splits = {info(node).position: LinearPlan(1024, 0, ((0, 1024),), None) for node in found.nodes(LINEAR)}
    counts = {
        chunks: sum(len(plan.streamed) for plan in fit_ring(found.module, splits, found.context, chunks).values())
        for chunks in (None, 2, 4)
    }
    assert counts[None] == counts[2] < counts[4]


@property_test
@given(st.lists(st.integers(0, 16), min_size=2, max_size=2), st.integers(4, 40), st.integers(1, 16))
def test_the_same_rows_in_chunks_of_at_most_the_same_size(base: Case, shares: list[int], ring: int, chunk: int) -> None:
    chunk = min(chunk, ring // 2)
    for before, after in fitted(base, shares, ring * GRANULE, chunk * GRANULE):
        assert (after.host, after.streamed_rows, after.resident) == (before.host, before.streamed_rows, None)
        edges = [before.host, *(hi for _, hi in after.streamed)]
        assert after.streamed == tuple(zip(edges, edges[1:], strict=False))
        assert all(0 < hi - lo <= 64 * chunk and lo % 64 == 0 for lo, hi in after.streamed)


def test_chunks_end_where_the_ring_does(base: Case) -> None:
    plans = fitted(base, [0, 0], ring_bytes=12 * GRANULE, chunk_bytes=5 * GRANULE)
    sizes = [(hi - lo) // 64 for _, after in plans for lo, hi in after.streamed]
    assert sum(sizes) == 32
    assert shortest_ring([size * GRANULE for size in sizes], 12 * GRANULE) <= 12 * GRANULE
    laps = _laps(sizes, 12)
    assert [sum(lap) for lap in laps[:-1]] == [12] * (len(laps) - 1) or max(sum(lap) for lap in laps) <= 12
    assert len(laps) == 3  # 32 granules in a ring of 12: pieces of one size would take four laps


@property_test
@given(st.lists(st.integers(1, 30), max_size=40), st.integers(30, 100))
def test_a_shorter_ring_takes_no_more_laps(sizes: list[int], ring: int) -> None:
    slots = [size * SLOT_ALIGNMENT for size in sizes]
    used = shortest_ring(slots, ring * SLOT_ALIGNMENT)
    assert max(slots, default=0) <= used <= ring * SLOT_ALIGNMENT
    assert len(_laps(slots, used)) <= len(_laps(slots, ring * SLOT_ALIGNMENT))
    one_lap = sum(slots) <= ring * SLOT_ALIGNMENT
    assert used >= LEAST_USED * ring * SLOT_ALIGNMENT or one_lap


def test_the_last_slot_ends_where_the_ring_does() -> None:
    slots = [3 * SLOT_ALIGNMENT] * 7
    assert shortest_ring(slots, 13 * SLOT_ALIGNMENT) == 12 * SLOT_ALIGNMENT  # 4 + 3, not 4 + 3 and a gap
    assert shortest_ring(slots, 100 * SLOT_ALIGNMENT) == 21 * SLOT_ALIGNMENT


def _laps(sizes: list[int], ring: int) -> list[list[int]]:
    laps: list[list[int]] = [[]]
    for size in sizes:
        if sum(laps[-1]) + size > ring:
            laps.append([])
        laps[-1].append(size)
    return laps


@pytest.mark.parametrize("chunk", [0, 1, 64, 512])
def test_a_chunk_is_never_without_rows(chunk: int) -> None:
    """Asked for more chunks than a short ring holds, of which each would be shorter than a granule of rows."""
    cuts = list(islice(_Cutter(512).cut(0, 24, row_bytes=64, chunk=chunk, step=8), 100))
    assert [hi - lo for lo, hi in cuts] == [8, 8, 8]
    assert (cuts[0][0], cuts[-1][1]) == (0, 24)
