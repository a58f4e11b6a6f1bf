"""Hostile hardware files and cache folders: one clear error or one line in the log, in no time, and never a crash."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetegen_compile.calibration import cache_path, read_profile, write_profile
from hetegen_compile.cost_model import HardwareProfile, load_profile, profile_to_json
from hetegen_compile.errors import HardwareProfileError
from tests.calibration.tiny import MACHINE

VALID = json.dumps(profile_to_json(load_profile("a10-xeon")))
LONG = "k" * 400_000


def _refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(HardwareProfileError) as caught:
        load_profile(str(path))
    assert str(caught.value).startswith(f"hardware profile '{path}'")
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(VALID.replace('"name"', '"name": "x", "name"', 1), "twice", id="a key twice"),
        pytest.param("{" + ",".join(f'"{i}":0' for i in range(90_000)) + ',"0":1}', "twice", id="one of 90000 twice"),
        pytest.param(VALID.replace("{", f'{{"{LONG}": 1,', 1), "unknown field", id="a long key"),
        pytest.param(f'{{"{LONG}": 1, "{LONG}": 2}}', "twice", id="a long key twice"),
        pytest.param('{"a":' * 150_000 + "1" + "}" * 150_000, "nested", id="deep objects"),
        pytest.param(VALID.replace("float32", "float32\\u0000"), "letters", id="a zero byte in a key"),
        pytest.param(VALID[: len(VALID) // 2], "JSON", id="half of it"),
        pytest.param(VALID + VALID, "JSON", id="two of them"),
        pytest.param('{"schema_version": 999, "all": "new"}', "upgrade hetegen", id="newer"),
        pytest.param('{"schema_version": "1"}', "missing", id="a version of the wrong type"),
        pytest.param("[" * 999_999, "nested", id="a million brackets"),
        pytest.param("\"__import__('os').abort()\"", "give an object", id="code"),
        pytest.param("cos\nsystem\n(S'true'\ntR.", "JSON", id="a pickle"),
    ],
)
def test_a_hostile_file_is_refused_in_a_short_line(tmp_path: Path, content: str, told: str) -> None:
    message = _refused(tmp_path / "profile.json", content.encode())
    assert told in message
    assert len(message) < 1500


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e9", "0", '"26GB/s"', "true", "[1e9]"])
def test_a_rate_that_is_none(tmp_path: Path, number: str) -> None:
    data = json.loads(VALID)
    data["host"]["memory_bytes_per_s"] = "RATE"
    message = _refused(tmp_path / "profile.json", json.dumps(data).replace('"RATE"', number).encode())
    assert "finite number" in message or "host.memory_bytes_per_s" in message


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=200), st.integers(0, len(VALID)), st.integers(0, 60))
def test_any_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, dirt: bytes, at: int, gone: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(VALID.encode()[:at] + dirt + VALID.encode()[at + gone :])
    found: HardwareProfile | HardwareProfileError
    try:
        found = load_profile(str(path))
    except HardwareProfileError as error:
        found = error
    assert isinstance(found, HardwareProfile) or len(str(found)) < 2500


# ---- the cache folder ------------------------------------------------------------------------------------------


@pytest.fixture
def profile() -> HardwareProfile:
    return replace(load_profile("t4-xeon"), name=MACHINE.profile_name)


def test_a_home_that_does_not_exist_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: HardwareProfile, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nonexistent"))
    assert cache_path(MACHINE) is None
    with caplog.at_level(logging.WARNING, logger="hetegen_compile"):
        assert not write_profile(cache_path(MACHINE), profile)
    assert not (tmp_path / "nonexistent").exists()
    assert "there is no home folder" in caplog.text


def test_all_folders_that_are_made_are_private(tmp_path: Path, profile: HardwareProfile) -> None:
    path = tmp_path / "cache" / "of" / "hetegen" / "profiles" / "x.json"
    umask = os.umask(0)
    try:
        assert write_profile(path, profile)
    finally:
        os.umask(umask)
    made = [path.parent, *path.parents[1:4]]
    assert [place.stat().st_mode & 0o777 for place in made] == [0o700] * 4
    assert read_profile(path, MACHINE) == profile


@pytest.mark.parametrize("method", ["mkdir", "chmod"])
def test_a_folder_that_is_read_only_is_one_line(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: HardwareProfile,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(Path, method, refuse)
    with caplog.at_level(logging.WARNING, logger="hetegen_compile"):
        assert not write_profile(tmp_path / "hetegen" / "profiles" / "x.json", profile)
    assert len(caplog.messages) == 1
    assert "Read-only" in caplog.text
