"""Layers, lowest first: cost_model, passes, planning, and what runs; leaves may be imported by all of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {
    f"hetegen_compile.{name}"
    for name in ("errors", "geometry", "ir", "linear_parts", "operands", "options", "rows", "system")
}
BELOW = {
    "cost_model": {"hetegen_compile.cost_model"},
    "passes": {"hetegen_compile.cost_model", "hetegen_compile.passes"},
    "hetegen_compile/planning": {
        f"hetegen_compile.{name}"
        for name in ("cost_model", "passes", "pipeline", "graph_inputs", "planning", "reports.schedule")
    },
}


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "hetegen_compile")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("layer", BELOW)
def test_a_layer_imports_only_what_lies_below(layer: str) -> None:
    files = sorted((ROOT / layer).glob("*.py"))
    assert files
    for path in files:
        ours = {name for name in imported(path) if name.startswith("hetegen_compile.")}
        allowed = {name for name in ours if name in LEAVES or any(is_in(name, below) for below in BELOW[layer])}
        assert ours == allowed, f"{path.name} imports {sorted(ours - allowed)}"


RUNS = {
    f"hetegen_compile.{name}" for name in ("accelerators", "calibration", "host_memory", "mirrors", "runtime", "steps")
}


def test_planning_loads_nothing_that_runs() -> None:
    """Not even through what it imports."""
    code = "import sys; import hetegen_compile.planning.planner; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = [name for name in shown.stdout.split() if any(is_in(name, one) for one in RUNS)]
    assert not loaded
