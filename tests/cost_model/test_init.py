"""The package's borders: its public names, and that it stays pure arithmetic."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from hetegen_compile import cost_model

FOLDER = Path(cost_model.__file__).parent
ALLOWED = {*sys.stdlib_module_names, "sympy", "networkx", "hetegen_compile.errors"}


def test_every_public_name_exists_once() -> None:
    assert len(set(cost_model.__all__)) == len(cost_model.__all__)
    assert [name for name in cost_model.__all__ if not hasattr(cost_model, name)] == []


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_nothing_but_arithmetic_is_imported(path: Path) -> None:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(str(node.module))
    others = [name for name in names if not name.startswith("hetegen_compile.cost_model")]
    forbidden = [name for name in others if name not in ALLOWED and name.split(".")[0] not in ALLOWED]
    assert forbidden == []
