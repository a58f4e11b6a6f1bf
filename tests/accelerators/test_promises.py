"""Promises: what is known of them before the worker has come to them, and which item of which they are."""

from __future__ import annotations

import pytest

from hetegen_compile.accelerators.promises import Promise


def test_a_promise_is_known_once_it_is_kept() -> None:
    promise = Promise("p")
    items = [promise[0], promise[1], promise[1][0]]
    assert not any(one.known for one in (promise, *items))
    promise.keep(["a", ["b"]])
    assert all(one.known for one in (promise, *items))
    assert [one.kept() for one in items] == ["a", ["b"], "b"]
    assert promise[0].known, "also one that is asked for later"


def test_nothing_may_be_what_is_kept() -> None:
    promise = Promise("p")
    promise.keep(None)
    assert promise.known
    assert promise.kept() is None


def test_asking_for_what_is_not_known_says_whose_it_is() -> None:
    with pytest.raises(AssertionError, match="p is done before"):
        Promise("p")[0].kept()


def test_an_item_knows_its_place_in_its_source_alone() -> None:
    promise, other = Promise("p"), Promise("p")
    item = promise[2]
    assert item.place_in(promise) == 2
    assert item.place_in(other) is None
    assert item.place_in(item) is None
    assert promise.place_in(promise) is None
    nested = item[0]
    assert (nested.place_in(item), nested.place_in(promise)) == (0, None)
