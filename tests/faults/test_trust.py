"""What is trusted: nothing is unpickled, no text becomes code but a step's, and no name of a model can inject any."""

from __future__ import annotations

import ast
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx, nn

import hetegen_compile
from hetegen_compile.files import write_private
from hetegen_compile.passes.tensors import to_expr
from tests.backend.modules import BUDGET, Linear, around, plain, random
from tests.models.harness import RecordingBackend, compiled_like_eager, emulated

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for folder in ("hetegen_compile", "passes", "cost_model", "examples") for path in (ROOT / folder).rglob("*.py")
)
UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__",  # Python's
    "torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "numpy.load", "np.load",
    "sympy.parse_expr", "sympy.parsing.sympy_parser.parse_expr", "sympy.lambdify", "os.system", "subprocess.call",
}  # fmt: skip
"""Calls that make code or objects out of text or bytes."""
ALLOWED = {
    ("step_source.py", "exec"), ("step_source.py", "compile"),
    ("split.py", "sympy.lambdify"), ("expressions.py", "sympy.lambdify"),
}  # fmt: skip
"""The step's code and arithmetic on sizes, from a graph in memory; the balance's formula, from a dataclass's fields."""


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_no_source_unpickles_or_evaluates() -> None:
    found: set[tuple[str, str]] = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert not UNPICKLING & set(_imports(tree)), path
        found |= {(path.name, name) for name, _ in _calls(tree) if name in FORBIDDEN_CALLS}
    assert found == ALLOWED
    assert len(SOURCES) > 50


def test_sympy_parses_no_text() -> None:
    for path in SOURCES:
        for name, call in _calls(ast.parse(path.read_text())):
            if name.endswith("sympify"):  # evaluates text unless it is strict
                assert any(word.arg == "strict" and ast.unparse(word.value) == "True" for word in call.keywords), path
    with pytest.raises(sympy.SympifyError):
        to_expr("__import__('os').abort()")


# ---- generated code --------------------------------------------------------------------------------------------

HOSTILE = 'x); __import__("os"); abort(); ('


class _Hostile(nn.Module):
    """A submodule, a parameter and a buffer whose names are code, and keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(HOSTILE, nn.Linear(64, 64))
        self.add_module("lambda", nn.Linear(64, 64))
        self.add_module("prefetch", nn.Linear(64, 64))
        self.register_parameter('w"]\n    raise SystemExit', nn.Parameter(torch.ones(64)))
        self.register_buffer("inputs", torch.ones(64))

    def forward(self, x: Tensor, None_: Tensor) -> Tensor:
        weight = self._parameters['w"]\n    raise SystemExit']
        for layer in self.children():
            x = layer(x) * weight + self.inputs + None_
        return x


def test_hostile_names_are_only_names() -> None:
    torch.manual_seed(0)
    model = _Hostile().eval()

    def run() -> Tensor:
        with torch.no_grad():
            result: Tensor = model(random(3, 64), random(3, 64, seed=2))
        return result

    found = compiled_like_eager(model, run, options=emulated(gpu_memory=BUDGET))
    (graph,) = found.backend.graphs
    for plan in graph.plans:
        functions = ast.parse(plan.bound.source)
        called = {name for name, _ in _calls(functions)}
        operations = {"prefetch", "wait", "release", "to_host", "wait_host", "to_accelerator", "launch", "host"}
        operations |= {"ahead", "launch_chain", "_given.clear"}
        assert {"prefetch", "host", "launch", "launch_chain", "ahead"} <= called
        assert all(name in operations or name.startswith(("_function_", "slice", "twins.append")) for name in called)
        assert not any(isinstance(node, ast.Raise | ast.Import) for node in ast.walk(functions))
        assert all(
            isinstance(one, ast.FunctionDef) and one.name == "step" or one.name.startswith("chain_")
            for one in functions.body
            if isinstance(one, ast.FunctionDef)
        )


def test_names_in_a_graph_made_elsewhere_are_made_safe_by_fx() -> None:
    graph = fx.Graph()
    names = [graph.placeholder(name).name for name in ("import os", "x\ny", "lambda", "a.b", "é(", "1st", "exec")]
    assert all(name.isidentifier() for name in names)
    assert len(set(names)) == len(names)


def test_text_among_a_nodes_arguments_stays_text() -> None:
    text = '"); raise SystemExit #'

    def body(before: Linear, after: Linear, x: Tensor) -> tuple[Any, ...]:
        return after(torch.einsum("ij,ij->ij", before(x), x)), {text: x + 1}, text

    model = around(body)

    def run() -> Any:
        with torch.no_grad():
            return model(random(3, 64))

    found = compiled_like_eager(model, run, options=emulated(gpu_memory=BUDGET))
    assert found.compiled[2] == text


# ---- files -----------------------------------------------------------------------------------------------------


def test_a_file_is_whole_private_and_the_only_one(tmp_path: Path) -> None:
    path = tmp_path / ("name" * 50)
    path.write_text("old")
    path.chmod(0o666)
    write_private(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(handle: int) -> None:
        raise error

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(type(error)):
        write_private(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_traces_are_private_too(tmp_path: Path) -> None:
    model = around(plain)
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=BUDGET))
    with torch.no_grad():
        model(random(3, 64))
    path = tmp_path / "step.json"
    hetegen_compile.schedules()[-1].save_trace(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["traceEvents"]
