"""The backend is found by its name in a process that imports torch only."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import torch

class Model(torch.nn.Module):  # Dynamo leaves nn.Linear itself in eager
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(64, 64)

    def forward(self, x):
        return self.up(x)

assert "hetegen" in torch._dynamo.list_backends()
model = Model()
model.compile(backend="hetegen", options={"accelerator": "emulated", "gpu_memory": "16KiB", "split": 0.5})
x = torch.randn(2, 64)
with torch.no_grad():
    torch.testing.assert_close(model(x), model.up(x))

import hetegen_compile  # to look at what happened

(schedule,) = hetegen_compile.schedules()
assert schedule.host_bytes > 0
assert schedule.streamed_bytes > 0
"""


NOT_INSTALLED = """
import importlib.metadata
importlib.metadata.entry_points = lambda **selection: importlib.metadata.EntryPoints(())
import torch
assert "hetegen" not in torch._dynamo.list_backends()
import hetegen_compile
"""


def test_a_checkout_that_is_not_installed_needs_an_import_only() -> None:
    """On the path without an entry point, as with PYTHONPATH: the import tells torch the name."""
    done = subprocess.run(
        [sys.executable, "-c", NOT_INSTALLED + SCRIPT], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def _is_installed() -> bool:
    return "hetegen" in importlib.metadata.entry_points(group="torch_dynamo_backends").names


@pytest.mark.skipif(not _is_installed(), reason="the package is not installed here: no entry point 'hetegen'")
def test_a_fresh_process_needs_no_import(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_entry_point_names_the_backend() -> None:
    if not _is_installed():
        pytest.skip("the package is not installed here: no entry point 'hetegen'")
    from hetegen_compile.backend import hetegen

    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="hetegen")
    assert entry.load() is hetegen
