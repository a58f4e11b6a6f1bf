"""What is written to the cache comes back; nothing that is wrong with a file is trusted or fatal."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hetegen_compile.calibration import cache_path, read_profile, write_profile
from hetegen_compile.cost_model import HardwareProfile, load_profile, profile_to_json
from tests.calibration.tiny import MACHINE


@pytest.fixture
def profile() -> HardwareProfile:
    return replace(load_profile("t4-xeon"), name=MACHINE.profile_name)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = cache_path(MACHINE)
    assert found is not None
    return found


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, logger="hetegen_compile")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_the_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    name = f"{MACHINE.key}.json"
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_path(MACHINE) == tmp_path / ".cache/hetegen/profiles" / name
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_path(MACHINE) == tmp_path / ".cache/hetegen/profiles" / name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert cache_path(MACHINE) == tmp_path / "elsewhere/hetegen/profiles" / name


def test_without_a_home_there_is_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_path(MACHINE) is None


def test_what_is_written_comes_back(path: Path, profile: HardwareProfile, warnings: Callable[[], list[str]]) -> None:
    assert write_profile(path, profile)
    assert read_profile(path, MACHINE) == profile
    assert warnings() == []


def test_files_are_private_and_nothing_else_is_left(path: Path, profile: HardwareProfile) -> None:
    path.parent.mkdir(parents=True)
    path.parent.chmod(0o777)
    umask = os.umask(0)
    try:
        write_profile(path, profile)
        write_profile(path, profile)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(
    path: Path,
    profile: HardwareProfile,
    monkeypatch: pytest.MonkeyPatch,
    warnings: Callable[[], list[str]],
) -> None:
    write_profile(path, profile)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not write_profile(path, replace(profile, description="newer"))
    assert read_profile(path, MACHINE) == profile
    assert list(path.parent.iterdir()) == [path]
    assert len(warnings()) == 1
    assert "No space left" in warnings()[0]


def test_a_missing_file_is_silent(path: Path, warnings: Callable[[], list[str]]) -> None:
    assert read_profile(path, MACHINE) is None
    assert warnings() == []


def _text(content: str | bytes) -> Callable[[Path, dict[str, Any]], None]:
    def damage(path: Path, data: dict[str, Any]) -> None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def _field(**changes: object) -> Callable[[Path, dict[str, Any]], None]:
    def damage(path: Path, data: dict[str, Any]) -> None:
        path.write_text(json.dumps({**data, **changes}))

    return damage


def _link(path: Path, data: dict[str, Any]) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def _folder(path: Path, data: dict[str, Any]) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path, data: dict[str, Any]) -> None:
    path.unlink()
    os.mkfifo(path)


def _truncate(path: Path, data: dict[str, Any]) -> None:
    path.write_text(path.read_text()[:200])


def _open_up(path: Path, data: dict[str, Any]) -> None:
    path.chmod(0o622)


DAMAGES: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "empty": _text(""),
    "truncated": _truncate,
    "binary": _text(b"\x80\x04\x95\xff\xfe"),
    "nested": _text("[" * 100_000),
    "huge": _text(" " * 2_000_000),
    "infinite rate": _text('{"pin_bytes_per_s": Infinity}'),
    "newer schema": _field(schema_version=999),
    "negative": _field(synchronise_s=-1),
    "unknown field": _field(run="rm"),
    "of another machine": _field(name=replace(MACHINE, threads=99).profile_name),
    "a link": _link,
    "a folder": _folder,
    "a pipe": _pipe,
    "writable by others": _open_up,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_file_that_is_wrong_is_one_line_and_replaced(
    kind: str, path: Path, profile: HardwareProfile, warnings: Callable[[], list[str]]
) -> None:
    write_profile(path, profile)
    DAMAGES[kind](path, profile_to_json(profile))
    assert read_profile(path, MACHINE) is None
    assert len(warnings()) == 1
    assert str(path) in warnings()[0]
    if kind != "a folder":
        assert write_profile(path, profile)
        assert read_profile(path, MACHINE) == profile


def test_a_file_of_another_user_is_not_read(
    path: Path, profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    write_profile(path, profile)
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    assert read_profile(path, MACHINE) is None
    assert "another user" in warnings()[0]


def test_a_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, profile: HardwareProfile, warnings: Callable[[], list[str]]
) -> None:
    (tmp_path / "file").touch()
    assert not write_profile(tmp_path / "file" / "profiles" / "x.json", profile)
    assert len(warnings()) == 1


def test_no_place_is_one_line(profile: HardwareProfile, warnings: Callable[[], list[str]]) -> None:
    assert not write_profile(None, profile)
    assert len(warnings()) == 1
