"""Runs of the host in a bound step: their lines, what the accelerator is given, and the times of their parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import fx

from hetegen_compile.accelerators import Accelerator, EmulatedAccelerator, Op
from hetegen_compile.cost_model import KernelChoice
from hetegen_compile.host_kernels.program import HostProgram
from hetegen_compile.ir import info
from hetegen_compile.passes.findings import Work
from hetegen_compile.steps.bind import bind
from hetegen_compile.steps.bound_step import BoundStep
from tests.host_graphs import Host, mlp


class Recording(EmulatedAccelerator):
    """Keeps what the host's thread is given."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.given: list[tuple[Op, Callable[..., Any]]] = []

    def host(self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.given.append((op, function))
        return super().host(op, function, args, kwargs)


@pytest.fixture
def accelerator() -> Iterator[Recording]:
    opened = Recording()
    yield opened
    opened.close()


OURS = {"float32": KernelChoice(((1.0, "vectorised"),))}


def bound(host: Host, accelerator: Accelerator, work: Mapping[str, Work] = MappingProxyType({})) -> BoundStep:
    nodes = {node.name: node for node in host.graph.nodes}
    seconds = {nodes[name]: one for name, one in work.items()}
    return bind(fx.GraphModule({}, host.graph), seconds, accelerator, OURS)


def test_a_run_is_one_line_and_the_names_of_its_results(accelerator: Recording) -> None:
    lines = [re.sub(r"_\d+\b", "", line.strip()) for line in bound(mlp(), accelerator).source.splitlines()]
    assert lines[-5:] == [
        "_run_down = host(_op, _program, (wu[4:28], wd[:, 0:24], x, bu,), {})",
        "down = _run_down[0]",
        "del _run_down",
        "del x, wu, bu, wd",
        "return (down,), twins",
    ]
    assert not any(line.startswith(("up =", "act =")) for line in lines)


def test_a_run_of_the_workers_is_given_to_it(accelerator: Recording) -> None:
    first, second = (
        line.strip() for line in bound(mlp(ahead=True), accelerator).source.splitlines() if "_program_" in line
    )
    assert first.startswith("_run_act = host(")
    assert second.startswith("_run_down = host_ahead(")


def test_a_step_computes_its_runs_and_times_their_parts(accelerator: Recording) -> None:
    host = mlp()
    work = {"up": Work("host", 1e-6, 1e-7), "act": Work("host", 2e-6), "down": Work("host", 4e-6, 2e-7)}
    step = bound(host, accelerator, work)
    inputs = [info(node).value for node in host.graph.find_nodes(op="placeholder")]
    accelerator.trace(True)
    accelerator.begin_step()
    (found,), _ = step.run(inputs, [], [])
    accelerator.end_step()
    torch.testing.assert_close(found, info(next(reversed(host.linears))).value)
    ((op, function),) = accelerator.given
    assert isinstance(function, HostProgram)
    assert (op.name, op.parts) == ("down", ("up", "act", "down"))
    assert [op.seconds, op.issue_s] == pytest.approx([7e-6, 3e-7])
    spans = accelerator.trace(False)
    assert [(span.name, span.resource) for span in spans] == [(name, "host") for name in op.parts]
    assert all(span.start_s <= span.end_s for span in spans)
    assert spans[0].start_s < spans[-1].end_s
