"""The backend is found by its name in a process that imports torch only."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hetegen_compile.registration import Checkout, CheckoutFinder, register_checkout

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
import importlib.metadata, sys

for finder in sys.meta_path:
    if hasattr(finder, "find_distributions"):
        finder.find_distributions = lambda *context: iter(())
import hetegen_compile
assert "torch" not in sys.modules, "importing the package is to stay light"
"""


def test_a_checkout_that_is_not_installed_needs_an_import_only() -> None:
    """On the path without an entry point, as with PYTHONPATH: the import makes the name known."""
    done = subprocess.run(
        [sys.executable, "-c", NOT_INSTALLED + SCRIPT], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_an_installed_package_is_found_before_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.EntryPoint("hetegen", "installed:hetegen", "torch_dynamo_backends")

    class Installed(Checkout):
        entry_points = importlib.metadata.EntryPoints((installed,))

    class Finder(CheckoutFinder):
        def find_distributions(self, *_: object) -> Iterator[Checkout]:
            yield Installed()

    register_checkout()
    assert sum(isinstance(finder, CheckoutFinder) for finder in sys.meta_path) == 1
    monkeypatch.setattr(sys, "meta_path", [Finder(), CheckoutFinder()])
    assert [e.value for e in importlib.metadata.entry_points(name="hetegen")] == ["installed:hetegen"]


def _is_installed() -> bool:
    found = importlib.metadata.entry_points(group="torch_dynamo_backends", name="hetegen")
    return any(not isinstance(entry.dist, Checkout) for entry in found)


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
