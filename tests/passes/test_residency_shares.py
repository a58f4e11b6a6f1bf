"""Shares of the memory for resident weights: never more than there is, fair between models, whoever asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetegen_compile.cost_model import row_granularity
from hetegen_compile.passes.claims import Claim
from hetegen_compile.passes.residency_shares import residency_shares, share_bytes
from tests.passes.graphs import property_test


def weight(key: object, rows: int = 256, row_bytes: int = 4, gain: float = 1.0, first: int = 0) -> Claim:
    return Claim(str(key), rows, first, row_bytes, gain)


def held(graphs: Sequence[Sequence[Claim]], first_rows: Mapping[object, int]) -> dict[str, int]:
    """Bytes of each weight that are resident."""
    claims = {str(claim.key): claim for graph in graphs for claim in graph}
    return {key: (c.rows - first_rows.get(key, c.rows)) * c.row_bytes for key, c in claims.items()}


claims = st.builds(
    Claim,
    key=st.sampled_from("abcdefgh"),
    rows=st.just(320),
    first=st.sampled_from([0, 64, 128]),
    row_bytes=st.just(8),
    gain_s_per_byte=st.sampled_from([1.0, 2.0]),
    kept_rows=st.sampled_from([0, 0, 64, 192, 320]),
)
graphs = st.lists(st.lists(claims, max_size=5).map(tuple), max_size=4)


@property_test
@given(graphs, st.integers(-100, 20_000))
def test_never_more_than_there_is(found: list[tuple[Claim, ...]], free_bytes: int) -> None:
    first_rows = residency_shares(found, free_bytes)
    assert sum(held(found, first_rows).values()) <= max(0, free_bytes)
    for graph in found:
        for claim in graph:
            first = first_rows.get(claim.key, claim.rows)
            assert claim.first <= first <= claim.rows
            assert first % row_granularity(claim.rows) == 0


@property_test
@given(graphs, st.integers(0, 20_000), st.integers(0, 2_000))
def test_less_memory_only_takes_rows_away(found: list[tuple[Claim, ...]], free_bytes: int, less: int) -> None:
    before = held(found, residency_shares(found, free_bytes))
    after = held(found, residency_shares(found, free_bytes - less))
    assert all(after[key] <= nbytes for key, nbytes in before.items())


@pytest.mark.parametrize("free_bytes", [0, 1000, 2000, 5000])
def test_who_asks_does_not_matter(free_bytes: int) -> None:
    """Prefill and decode of one model enter the ledger one after the other, and each asks as the last."""
    prefill = [weight(i) for i in range(4)]
    decode = [weight(i) for i in range(4)]
    alone = residency_shares([prefill], free_bytes)
    assert residency_shares([prefill, decode], free_bytes) == alone
    assert residency_shares([decode, prefill, prefill], free_bytes) == alone


@pytest.mark.parametrize("free_bytes", [1000, 2000, 3000])
def test_who_asks_does_not_matter_where_graphs_keep_different_rows(free_bytes: int) -> None:
    prefill = [weight(i) for i in range(4)]
    decode = [replace(weight(i), kept_rows=64) for i in range(4)]
    assert residency_shares([prefill, decode], free_bytes) == residency_shares([decode, prefill], free_bytes)


def test_most_gain_per_byte_first_and_the_last_in_part() -> None:
    graph = [weight("little", gain=1.0), weight("much", gain=3.0), weight("some", gain=2.0)]
    assert residency_shares([graph], 1024 + 64 * 4 + 10) == {"much": 0, "some": 192}


def test_kept_rows_come_before_any_others() -> None:
    graph = [weight("much", gain=3.0), replace(weight("kept", gain=1.0), kept_rows=128)]
    assert residency_shares([graph], 1024 + 64 * 4) == {"much": 64, "kept": 128}


def test_models_without_a_common_weight_share_in_proportion() -> None:
    one, other = [weight(f"a{i}", gain=9.0) for i in range(2)], [weight(f"b{i}") for i in range(6)]
    found = held([one, other], residency_shares([one, other], 4096))
    assert sum(nbytes for key, nbytes in found.items() if key.startswith("a")) == 1024
    assert sum(nbytes for key, nbytes in found.items() if key.startswith("b")) == 3072


def test_a_graph_that_claims_less_is_of_the_same_model() -> None:
    """Experts that it would not use, say: the others' rank holds."""
    prompt = [weight("linear"), replace(weight("experts", rows=1, row_bytes=4096), rank=1)]
    for graphs in ([prompt, prompt[:1]], [prompt[:1], prompt]):
        assert residency_shares(graphs, 2048) == {"linear": 0}
    assert share_bytes(prompt[:1], [prompt], 1000) == 1000


def test_a_graph_that_shares_all_with_two_makes_one_model_of_them() -> None:
    one, other, both = [weight("a", gain=2.0)], [weight("b", gain=1.0)], [weight("a"), weight("b")]
    assert residency_shares([one, other], 1024) == {"a": 128, "b": 128}
    assert residency_shares([one, other, both], 1024) == {"a": 0}


def test_a_graph_that_shares_most_with_two_makes_one_model_of_them() -> None:
    one, between, other = (
        [weight(key, gain=9.0 if key == "a" else 2.0) for key in keys] for keys in ("abc", "bcd", "cde")
    )
    assert len(residency_shares([one, other], 1024)) > 1
    for graphs in ([one, other, between], [between, one, other]):
        assert residency_shares(graphs, 1024) == {"a": 0}


@pytest.mark.parametrize("first", [0, 1])
def test_models_that_share_a_weight_share_the_memory(first: int) -> None:
    """Though one of them has been weighed and would keep all of its own first, and most of the other's is shared."""
    target = [replace(weight(f"a{i}", gain=9.0), kept_rows=256, weighed=True) for i in range(4)]
    draft = [weight(f"b{i}") for i in range(2)]
    shared = weight("shared", rows=640)
    models = [[*target, shared], [*draft, shared]]
    for graphs in (models[first:] + models[:first], [*models, *models]):
        found = held(graphs, residency_shares(graphs, 8704 // 2))
        assert sum(nbytes for key, nbytes in found.items() if key.startswith("a")) == 4096 // 2
        assert sum(nbytes for key, nbytes in found.items() if key.startswith("b")) == 2048 // 2
        assert found["shared"] == 2560 // 2


def test_what_a_graph_gets_of_the_memory() -> None:
    one, other, shared = [weight("a"), weight("b")], [weight("c")], weight("s")
    assert share_bytes(one, [], 1000) == 1000
    assert share_bytes(one, [other, one], 900) == 600
    assert share_bytes([*one, shared], [[*other, shared]], 1000) == 750  # and the other's are 500, with that in both


def test_of_two_claims_on_one_weight_the_one_for_fewer_rows_counts() -> None:
    assert residency_shares([[weight("a")], [weight("a", first=128)]], 5000) == {"a": 128}
