"""Options of any type and size: taken as they are or refused by name, in one short line."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetegen_compile.errors import OptionError
from hetegen_compile.options import Options, parse_bytes, parse_options

KEYS = [field.name for field in dataclasses.fields(Options)]


class Rude:
    """Raises whatever is asked of it."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    __hash__ = None  # type: ignore[assignment]


ODD = [
    Rude(), np.array(["auto", "cuda"]), np.zeros(3), torch.ones(2), torch.tensor(0.5), b"auto", 10**400, -(10**400),
    Fraction(10**400, 3), complex(1, 1), object, lambda: None, "9" * 100_000, "x" * 100_000, [[]] * 100_000, {}, (),
    float("inf"), float("nan"), "\0", "8GiB\n8GiB", "\ud800",
]  # fmt: skip
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
    | st.lists(st.integers()) | st.sampled_from(ODD)
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(KEYS), VALUES)
def test_any_value_is_taken_or_refused_by_name(key: str, value: Any) -> None:
    parsed: Options | None = None
    told = ""
    try:
        parsed = parse_options({key: value})
    except OptionError as error:
        told = str(error)
    assert len(told) < 800
    if parsed is None:
        assert repr(key) in told
    else:
        assert type(getattr(parsed, key)) in (type(None), bool, int, float, str)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", ODD[:14], ids=lambda value: type(value).__name__)
def test_an_odd_value_is_refused_by_name(key: str, value: Any) -> None:
    if isinstance(value, str) and key == "hardware":
        pytest.skip("any text may be a path")
    with pytest.raises(OptionError, match=f"option '{key}'"):
        parse_options({key: value})


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.text() | st.integers() | st.tuples(st.text()) | st.binary())
def test_any_other_key_is_refused_with_the_valid_ones(key: Any) -> None:
    with pytest.raises(OptionError, match="unknown option") as caught:
        parse_options({key: 1})
    assert ", ".join(KEYS) in str(caught.value)


def test_long_keys_and_sizes_make_short_messages() -> None:
    with pytest.raises(OptionError) as key:
        parse_options({"k" * 1_000_000: 1})
    with pytest.raises(OptionError) as size:
        parse_bytes("9" * 1_000_000)
    assert max(len(str(key.value)), len(str(size.value))) < 800


@pytest.mark.parametrize("key", ["gpu_memory", "context", "max_batch", "seed"])
def test_whole_numbers_are_bounded(key: str) -> None:
    assert getattr(parse_options({key: 2**62}), key) == 2**62
    with pytest.raises(OptionError, match=key):
        parse_options({key: 2**62 + 1})
