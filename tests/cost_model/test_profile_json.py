"""Reading profiles: what is wrong in a file is told with its path, its value and the remedy."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetegen_compile.cost_model import (
    SCHEMA_VERSION,
    load_profile,
    preset_names,
    profile_from_json,
    profile_to_json,
    unsourced_fields,
)
from hetegen_compile.errors import HardwareProfileError

REMOVE = object()
VALID = profile_to_json(load_profile("a10-xeon"))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def changed(path: str, value: object) -> dict[str, Any]:
    """A valid profile's JSON with one field replaced (or removed)."""
    data = copy.deepcopy(VALID)
    *parents, last = path.split(".")
    place = data
    for key in parents:
        place = place[key]
    if value is REMOVE:
        del place[last]
    else:
        place[last] = value
    return data


def leaves(data: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of everything in a profile's JSON that is no object."""
    return [
        path
        for key, value in data.items()
        for path in (leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key])
        if "sources" not in path
    ]


def refusal(data: object) -> str:
    """The message with which a profile is refused."""
    with pytest.raises(HardwareProfileError) as caught:
        profile_from_json(data, "mine.json")
    return str(caught.value)


@pytest.mark.parametrize("name", preset_names())
def test_a_profile_survives_the_way_through_json(name: str) -> None:
    profile = load_profile(name)
    text = json.dumps(profile_to_json(profile), allow_nan=False)
    assert profile_from_json(json.loads(text), "copy") == profile


def test_a_profile_is_loaded_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(changed("name", "mine")))
    assert load_profile(str(path)).name == "mine"


@pytest.mark.parametrize(
    "path", ["host.memory_bytes_per_s", "host.flops_per_s.float32", "pin_bytes_per_s", "host.contention"]
)
@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, 10**400, True, "5", None, [1.0]])
def test_a_rate_is_a_positive_finite_number(path: str, value: object) -> None:
    message = refusal(changed(path, value))
    assert message.startswith(f"hardware profile 'mine.json': {path} is ")
    assert "give a number" in message


@pytest.mark.parametrize("value", [-1e-6, math.nan, math.inf, False])
def test_seconds_may_be_zero_but_not_negative(value: object) -> None:
    assert profile_from_json(changed("link.view_s", 0), "mine").link.view_s == 0.0
    assert "link.view_s is" in refusal(changed("link.view_s", value))


@pytest.mark.parametrize("value", [1.5, 16.0, 0, -2, True, "16"])
def test_a_count_is_a_positive_whole_number(value: object) -> None:
    assert f"host.cores is {value!r}" in refusal(changed("host.cores", value))


def test_contention_is_a_share() -> None:
    assert profile_from_json(changed("host.contention", 1), "mine").host.contention == 1.0
    assert "host.contention is 1.01" in refusal(changed("host.contention", 1.01))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([[2, 1e9], [1, 1e9]], "sort by x"),
        ([], "no points"),
        ([[1, 2, 3]], r"link.up.pinned[0] is [1, 2, 3]: give a pair"),
        ([[1, 1e9], [2, 0]], r"link.up.pinned[1][1] is 0"),
        ([[1, 1e9], [2, math.nan]], r"link.up.pinned[1][1] is nan"),
        ([5], "link.up.pinned[0] is 5"),
        (24e9, "link.up.pinned is 24000000000.0"),
        ([[index, 1e9] for index in range(1, 1002)], "at most 1000"),
    ],
)
def test_a_curve_is_a_sorted_list_of_pairs(value: object, told: str) -> None:
    message = refusal(changed("link.up.pinned", value))
    assert told in message
    assert "link.up.pinned" in message


def test_an_unknown_field_is_told_with_the_nearest_valid_one() -> None:
    message = refusal(changed("host.launch_sec", 1e-5))
    assert "host.launch_sec" in message
    assert "did you mean 'launch_s'" in message


@pytest.mark.parametrize("path", ["name", "host", "link.down.pageable", "sources", "schema_version"])
def test_a_missing_field_is_named(path: str) -> None:
    assert f"{path} is missing" in refusal(changed(path, REMOVE))


@pytest.mark.parametrize("path", ["name", "description", "host.name"])
@pytest.mark.parametrize("value", ["", "  ", "x" * 5000, 7, None])
def test_a_text_is_a_short_string(path: str, value: object) -> None:
    message = refusal(changed(path, value))
    assert f"{path} is" in message
    assert len(message) < 300


@pytest.mark.parametrize("path", ["host.flops_per_s", "host.linear_bytes_per_s", "sources"])
@pytest.mark.parametrize("value", [{}, [], None, {"": 1.0}, {"two words": 1.0}])
def test_a_mapping_has_entries_with_plain_keys(path: str, value: object) -> None:
    assert path in refusal(changed(path, value))


def test_a_newer_schema_asks_for_a_newer_version() -> None:
    message = refusal({"schema_version": SCHEMA_VERSION + 1, "unheard_of": 1})
    assert f"schema_version is {SCHEMA_VERSION + 1}" in message
    assert "upgrade" in message


@pytest.mark.parametrize("where", ["sources", "inferred"])
def test_a_source_names_a_field(where: str) -> None:
    value = {"host.lunch_s": "a guess"} if where == "sources" else ["host.lunch_s"]
    message = refusal(changed(where, value))
    assert f"an entry of {where} is 'host.lunch_s'" in message


def test_a_field_without_a_source_is_found() -> None:
    sources = dict(load_profile("a10-xeon").sources)
    del sources["link.view_s"], sources["link"]
    profile = profile_from_json(changed("sources", sources), "mine")
    expected = {"link.view_s", "link.up.pinned", "link.up.pageable", "link.down.pinned", "link.down.pageable"}
    assert set(unsourced_fields(profile)) == expected


@pytest.mark.parametrize("data", [None, [], "text", 5, True])
def test_a_profile_is_an_object(data: object) -> None:
    assert "give an object" in refusal(data)


def test_nesting_is_bounded_in_data_and_in_text(tmp_path: Path) -> None:
    nested: list[object] = []
    for _ in range(20):
        nested = [nested]
    assert "nested deeper than" in refusal(changed("inferred", nested))
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(HardwareProfileError, match="nested"):
        load_profile(str(path))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        (b'{"a": NaN}', "NaN: give a finite number"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b"9" * 5000, "not valid JSON"),
        (b" " * 1_000_001, "larger than 1000000 bytes"),
    ],
)
def test_a_broken_file_is_told_with_its_path(tmp_path: Path, text: bytes, told: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text)
    with pytest.raises(HardwareProfileError, match=told) as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["a10", "", "no/such.json", ".", "nul\0byte", "x" * 5000])
def test_what_is_neither_preset_nor_file_is_told_with_the_presets(name: str) -> None:
    with pytest.raises(HardwareProfileError, match="neither a preset nor a file") as caught:
        load_profile(name)
    assert all(preset in str(caught.value) for preset in preset_names())


@given(st.data())
def test_any_other_value_is_read_as_given_or_refused(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(leaves(VALID)))
    altered = changed(path, data.draw(json_values))
    try:
        profile = profile_from_json(altered, "mine")
    except HardwareProfileError:
        assert json.dumps(altered) != json.dumps(VALID), "true is 1 to Python, and no number in a profile"
    else:
        assert profile_to_json(profile) == altered


@given(json_values)
def test_any_json_is_refused_by_our_own_error(value: object) -> None:
    assert refusal(value)


def test_a_source_covers_what_is_below_it_and_not_what_begins_like_it() -> None:
    data = changed("host.flops_per_s", {"int4": 1.0, "int4_packed": 1.0})
    sources = {path: text for path, text in data["sources"].items() if path != "host.flops_per_s"}
    data["sources"] = sources | {"host.flops_per_s.int4": "measured"}
    data["inferred"] = []
    assert unsourced_fields(profile_from_json(data, "mine")) == ("host.flops_per_s.int4_packed",)


TABLE = [
    {"weight_bytes": 1e6, "points": [[1, 10e9], [4, 5e9]]},
    {"weight_bytes": 64e6, "points": [[1, 40e9], [4, 20e9]]},
]
KERNELS = {"float32": [[1, "vectorised"], [16, "F.linear"]]}


def test_rates_by_size_and_kernels_come_back_as_they_were_written() -> None:
    data = changed("host.linear_bytes_per_s", {"float32": TABLE, "int8": [[1, 3e9]]})
    data["host"]["linear_kernels"] = KERNELS
    profile = profile_from_json(data, "mine")
    assert profile.host.linear_bytes_per_s["float32"].at(1, 64e6) == 40e9
    assert profile.host.linear_bytes_per_s["int8"].at(9, 5) == 3e9
    assert profile.host.linear_kernels["float32"].at(2) == "vectorised"
    written = profile_to_json(profile)
    assert written["host"]["linear_bytes_per_s"]["float32"] == TABLE
    assert written["host"]["linear_bytes_per_s"]["int8"] == [[1, 3e9]]
    assert written["host"]["linear_kernels"] == KERNELS
    assert profile_from_json(json.loads(json.dumps(written)), "again") == profile


def test_a_profile_of_before_there_were_kernels_is_read_and_written_without_them() -> None:
    profile = load_profile("a10-xeon")
    assert profile.host.linear_kernels == {}
    assert "linear_kernels" not in profile_to_json(profile)["host"]


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ([{"weight_bytes": 0, "points": [[1, 1]]}], r"float32[0].weight_bytes is 0"),
        ([{"points": [[1, 1]]}], "float32[0].weight_bytes is missing"),
        ([{"weight_bytes": 1, "points": [[1, 1]], "dots": 1}], "float32[0].dots is 1: unknown field"),
        ([{"weight_bytes": 1, "points": [[1]]}], "float32[0].points[0] is [1]"),
        ([TABLE[1], TABLE[0]], "sort by bytes"),
        ([TABLE[0], [1, 2]], "float32[0]"),
    ],
)
def test_a_wrong_table_is_refused_with_its_place(table: object, complaint: str) -> None:
    assert complaint in refusal(changed("host.linear_bytes_per_s", {"float32": table}))


@pytest.mark.parametrize("points", [[], [[1]], [[0, "a"]], [[1, 2]], [[1, ""]], [[2, "a"], [1, "b"]], "a"])
def test_wrong_kernels_are_refused_with_their_place(points: object) -> None:
    data = changed("name", "mine")
    data["host"]["linear_kernels"] = {"float32": points}
    assert "host.linear_kernels.float32" in refusal(data)
