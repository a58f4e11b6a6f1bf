"""A measured profile's key: whatever it depends on changes it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetegen_compile.calibration import machine
from hetegen_compile.cost_model import SCHEMA_VERSION
from hetegen_compile.host_kernels import vectorised
from tests.calibration.tiny import MACHINE


def test_every_part_of_the_identity_changes_the_key() -> None:
    others = [
        replace(MACHINE, cpu="another"),
        replace(MACHINE, gpu="a GPU"),
        replace(MACHINE, torch_version="2.12.0"),
        replace(MACHINE, threads=5),
    ]
    keys = {one.key for one in (MACHINE, *others)}
    assert len(keys) == 5
    assert all(len(key) == 32 and int(key, 16) >= 0 for key in keys)


def test_the_schema_version_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = MACHINE.key
    monkeypatch.setattr(machine, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    assert MACHINE.key != before


def test_another_method_of_measuring_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = MACHINE.key
    monkeypatch.setattr(machine, "METHOD_VERSION", machine.METHOD_VERSION + 1)
    assert MACHINE.key != before


def test_other_host_kernels_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = MACHINE.key
    monkeypatch.setattr(vectorised, "_LINEARS", ("program.cpp",))
    vectorised.sources_digest.cache_clear()
    try:
        assert MACHINE.key != before
    finally:
        monkeypatch.undo()
        vectorised.sources_digest.cache_clear()
    assert MACHINE.key == before
