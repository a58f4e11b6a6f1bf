"""Options: what is accepted, what it becomes, and what each error tells the user."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetegen_compile.errors import HetegenError, OptionError
from hetegen_compile.options import Options, format_bytes, parse_bytes, parse_options


def test_nothing_given_means_the_defaults() -> None:
    assert parse_options(None) == parse_options({}) == Options()
    assert Options().gpu_memory is None
    assert Options().accelerator == "auto"
    assert Options().split == "auto"
    assert Options().print_schedule


def test_every_option_arrives_in_its_field() -> None:
    given_options: dict[str, object] = {
        "gpu_memory": "8GiB", "accelerator": "emulated", "hardware": "a100", "context": 4096, "max_batch": 3,
        "split": 0.25, "pair_mlp": True, "issue_ahead": False, "cuda_graphs": False, "pace": 20,
        "print_schedule": True, "seed": 7, "unfold": True,
    }  # fmt: skip
    parsed = parse_options(given_options)
    assert dataclasses.asdict(parsed) == {**given_options, "gpu_memory": 8 * 2**30, "pace": 20.0}
    assert set(given_options) == {field.name for field in dataclasses.fields(Options)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        parsed.split = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 * 2**30), ("8GB", 8 * 10**9), ("512 MiB", 512 * 2**20), ("1.5GB", 1_500_000_000),
        (" 2 tib ", 2 * 2**40), ("3kB", 3000), ("3KiB", 3072), ("7B", 7), ("4096", 4096), ("0.5GiB", 2**29),
        ("0.1KiB", 102), ("0MiB", 0),
    ],
)  # fmt: skip
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["8 gigs", "", "GiB", "-1GiB", "1e9", "1,5GB", ".5GB", "8GiB free", "nan", "8Gi", "٨GiB", "1_0GB"]
)
def test_what_is_not_a_size_says_what_is(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)
    assert "8GiB" in str(caught.value)


@given(st.integers(0, 2**40), st.sampled_from(["B", "kB", "MB", "GB", "KiB", "MiB", "GiB", "TiB"]))
def test_whole_sizes_are_exact(count: int, unit: str) -> None:
    power = "BKMGT".index(unit[0].upper())
    assert parse_bytes(f"{count}{unit}") == count * (1024 if "i" in unit else 1000) ** power


@given(st.integers(0, 2**50))
def test_formatted_sizes_read_back_to_two_decimals(nbytes: int) -> None:
    text = format_bytes(nbytes)
    assert abs(parse_bytes(text) - nbytes) <= 0.006 * parse_bytes(f"1 {text.split()[1]}")
    assert float(text.split()[0]) < 1024 or text.endswith("TiB")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (2**20 - 1, "1.00 MiB"), (1536 * 2**20, "1.50 GiB"),
     (3 * 2**40, "3.00 TiB"), (5000 * 2**40, "5000.00 TiB")],
)  # fmt: skip
def test_format_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("gpu_memory", "8 gigs", "8GiB"), ("gpu_memory", 0, "more than 0"), ("gpu_memory", -1, "more than 0"),
        ("gpu_memory", "0GiB", "more than 0"), ("gpu_memory", 8e9, "as an int"),
        ("gpu_memory", True, "as an int"),
        ("accelerator", "gpu", "'cuda'"), ("accelerator", None, "'emulated'"), ("accelerator", [], "'auto'"),
        ("hardware", "", "preset"), ("hardware", 3, "preset"),
        ("context", 0, "at least 1"), ("context", 12.0, "whole"), ("context", True, "whole"),
        ("max_batch", 0, "at least 1"), ("max_batch", None, "whole"), ("max_batch", math.nan, "whole"),
        ("split", 1.01, "from 0"), ("split", -0.1, "from 0"), ("split", math.nan, "from 0"),
        ("pair_mlp", "on", "'auto', True or False"), ("pair_mlp", 1, "'auto', True or False"),
        ("issue_ahead", "yes", "'auto', True or False"),
        ("split", True, "from 0"), ("split", "half", "'auto'"), ("split", None, "'auto'"),
        ("pace", 0, "positive"), ("pace", -2.0, "positive"), ("pace", math.nan, "positive"),
        ("pace", math.inf, "positive"), ("pace", False, "positive"), ("pace", "2", "positive"),
        ("print_schedule", 1, "True or False"), ("unfold", "yes", "True or False"),
        ("seed", -1, "at least 0"), ("seed", 1.5, "whole"), ("seed", False, "whole"),
    ],
)  # fmt: skip
def test_a_bad_value_names_option_value_and_what_is_valid(key: str, value: object, remedy: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_options({key: value})
    message = str(caught.value)
    assert repr(key) in message
    assert repr(value) in message
    assert remedy in message
    assert isinstance(caught.value, HetegenError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("gpu_mem", "gpu_memory"), ("print_shedule", "print_schedule"), ("max_batch_size", "max_batch"),
     ("Split", "split"), ("", None), ("zzz", None), (3, None)],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest_and_lists_all(key: str, nearest: str | None) -> None:
    with pytest.raises(OptionError) as caught:
        parse_options({key: 1})
    message = str(caught.value)
    assert f"unknown option {key!r}: did you mean '" in message
    assert all(field.name in message for field in dataclasses.fields(Options))
    if nearest is not None:
        assert f"did you mean {nearest!r}" in message


@pytest.mark.parametrize("options", ["gpu_memory", ["split"], 8])
def test_options_must_be_a_mapping(options: object) -> None:
    with pytest.raises(OptionError, match="must be a dict"):
        parse_options(options)  # type: ignore[arg-type]


def test_pace_is_for_the_emulated_accelerator() -> None:
    assert parse_options({"pace": 2, "accelerator": "auto"}).pace == 2.0
    assert parse_options({"pace": 2, "accelerator": "emulated"}).pace == 2.0
    with pytest.raises(OptionError, match="'pace' = 2.0.*accelerator='emulated'"):
        parse_options({"pace": 2, "accelerator": "cuda"})
    with pytest.raises(OptionError, match="'seed'"):
        parse_options({"seed": 0, "accelerator": "cuda"})


@given(st.floats(0, 1))
def test_a_share_is_kept_as_it_is(share: float) -> None:
    assert parse_options({"split": share}).split == share


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    given_options = {"gpu_memory": np.int64(2**33), "split": np.float32(0.5), "max_batch": np.int32(2)}
    parsed = parse_options(given_options)
    assert (parsed.gpu_memory, parsed.split, parsed.max_batch) == (2**33, 0.5, 2)
    assert type(parsed.gpu_memory) is int
    assert type(parsed.split) is float
