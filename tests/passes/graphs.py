"""Real Dynamo graphs for the tests of the passes, and a readable print of what a pass made of them."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import sympy
import torch
from hypothesis import settings
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import py_sym_types

from hetegen_compile import ir
from hetegen_compile.cost_model import HardwareProfile, Task, load_profile
from hetegen_compile.ir import info
from hetegen_compile.options import parse_options
from hetegen_compile.passes.annotate_costs import annotate_costs
from hetegen_compile.passes.capture import capture
from hetegen_compile.passes.choose_splits import block_splits
from hetegen_compile.passes.claims import NothingResident
from hetegen_compile.passes.context import Bucket, Context, Refusal, SegmentCache, require
from hetegen_compile.passes.findings import Prediction
from hetegen_compile.passes.group_segments import group_segments
from hetegen_compile.passes.grouped_products import products_with
from hetegen_compile.passes.insert_transfers import insert_transfers
from hetegen_compile.passes.place_nodes import place_nodes
from hetegen_compile.passes.plans import GROWTH, LinearPlan, Residency
from hetegen_compile.passes.schedule import schedule
from hetegen_compile.passes.sources import source_name
from hetegen_compile.passes.split_experts import split_experts
from hetegen_compile.passes.split_linears import split_linears
from hetegen_compile.passes.stream_experts import stream_experts
from hetegen_compile.pipeline import PIPELINE, run_pipeline
from hetegen_compile.steps.segments import plain_compiler
from tests.cost_model.lower_bound import lower_bound_s

PROFILE: HardwareProfile = load_profile("cpu-emulated")
GIB = 2**30

property_test = settings(deadline=None, max_examples=50)
"""For properties: the first example of a run traces and compiles, so no single one has a deadline."""


class _GraphTaken(BaseException):
    """Ends the call in the backend: nothing is executed, no guards are built. Dynamo wraps Exceptions only."""


def dynamo_graph(
    function: Callable[..., Any],
    *inputs: Any,
    dynamic: bool | None = None,
    dynamo: Mapping[str, bool] | None = None,
) -> tuple[fx.GraphModule, list[Any]]:
    """The one graph that Dynamo makes of ``function(*inputs)``, and its inputs; nothing is executed.

    ``dynamo`` changes Dynamo's config while it traces.
    """
    found: list[tuple[fx.GraphModule, list[Any], dict[fx.Node, Any]]] = []

    def backend(module: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        sources = {n: n.meta["grapharg"].source for n in module.graph.find_nodes(op="placeholder")}
        found.append((module, list(examples), sources))
        raise _GraphTaken

    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(dict(dynamo or {})), contextlib.suppress(_GraphTaken):
        torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    ((module, examples, sources),) = found
    for node, source in sources.items():  # Dynamo drops them on its way out
        node.meta["grapharg"] = SimpleNamespace(source=source)
    return module, [int(v.node.hint) if isinstance(v, py_sym_types) else v for v in examples]


def context_for(module: fx.GraphModule, inputs: Sequence[Any], **changes: Any) -> Context:
    """A context for a captured graph (captured here if it is not yet); ``changes`` replace fields.

    Plain segments, one token, no weight resident, 1 GiB; ``split``, ``pair_mlp`` and ``issue_ahead`` are "auto".
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    if not any(info(node).position >= 0 for node in module.graph.nodes):
        capture(module, inputs)
    given = {name: changes.pop(name, "auto") for name in ("split", "pair_mlp", "issue_ahead")}
    options = parse_options({"accelerator": "emulated", "hardware": "cpu-emulated", **given})
    pairs = list(zip(placeholders, inputs, strict=True))
    context = Context(
        options=options,
        profile=PROFILE,
        sizes={
            info(node).value.node.expr: sympy.Integer(value)
            for node, value in pairs
            if isinstance(info(node).value, py_sym_types)
        },
        bucket=Bucket(1, 1),
        budget_bytes=GIB,
        resident=NothingResident(),
        weights={node.name: value for node, value in pairs if _belongs_to_model(node, value)},
        segments=SegmentCache(plain_compiler(FakeTensorMode()), {}),
    )
    return replace(context, **changes)


def _belongs_to_model(node: fx.Node, value: Any) -> bool:
    if isinstance(value, nn.Parameter):
        return True
    source = str(getattr(node.meta["grapharg"].source, "name", ""))
    return isinstance(value, Tensor) and "_buffers[" in source


def run_until(stage: Callable[..., Any], module: fx.GraphModule, context: Context) -> Context:
    """Run the pipeline on ``module`` up to ``stage``, that one included."""
    stages = [line.run for line in PIPELINE]
    return run_pipeline(module, context, PIPELINE[: stages.index(stage) + 1])


@dataclass(repr=False)
class Case:
    """A captured graph on its way through the pipeline."""

    module: fx.GraphModule
    inputs: list[Any]
    context: Context

    def run(self, until: Callable[..., Any]) -> Case:
        """Run the pipeline up to ``until``, that stage included."""
        self.context = run_until(until, self.module, self.context)
        return self

    def apply(self, stage: Callable[..., Any]) -> Any:
        """Run one stage by itself; what it leaves is in the context, and returned."""
        (line,) = (line for line in PIPELINE if line.run is stage)
        self.context = run_pipeline(self.module, self.context, (line,))
        self.module.recompile()
        return None if line.leaves is None else getattr(self.context, line.leaves)

    def outputs(self) -> Any:
        """Execute the graph as it is, with the operations' reference kernels."""
        self.module.recompile()
        with torch.no_grad():
            return self.module(*self.inputs)

    def nodes(self, target: Any) -> list[Any]:
        """All calls of one function."""
        return list(self.module.graph.find_nodes(op="call_function", target=target))

    @property
    def refusals(self) -> list[Refusal]:
        """What was left alone."""
        return list(self.context.refusals)

    def reasons(self) -> list[str]:
        """Why nodes were left alone."""
        return [refusal.reason for refusal in self.refusals]

    @property
    def text(self) -> str:
        """The graph as text."""
        return ir_text(self.module.graph)


def case(
    function: Callable[..., Any],
    *inputs: Any,
    dynamic: bool | None = None,
    dynamo: Mapping[str, bool] | None = None,
    **changes: Any,
) -> Case:
    """``function(*inputs)`` captured, with a context whose fields ``changes`` replace."""
    module, graph_inputs = dynamo_graph(function, *inputs, dynamic=dynamic, dynamo=dynamo)
    return Case(module, graph_inputs, context_for(module, graph_inputs, **changes))


def again(base: Case, **changes: Any) -> Case:
    """A copy of a case to run other stages on; ``split`` and fields of the context may be replaced."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(base.module.graph, {}))
    split = changes.pop("split", base.context.options.split)
    options = replace(base.context.options, split=split)
    context = replace(base.context, options=options, refused={}, **changes)
    return Case(fx.GraphModule(base.module, graph), base.inputs, context)


# ---- plans decided by the test ---------------------------------------------------------------------------


def streamed(rows: int) -> LinearPlan:
    """All rows over the link, in one piece."""
    return LinearPlan(rows, 0, ((0, rows),), None)


def on_host(rows: int) -> LinearPlan:
    """All rows on the host."""
    return LinearPlan(rows, rows, (), None)


def resident(rows: int) -> LinearPlan:
    """All rows on the accelerator."""
    return LinearPlan(rows, 0, (), (0, rows))


def halves(rows: int) -> LinearPlan:
    """The first half on the host, the second half streamed."""
    return LinearPlan(rows, rows // 2, ((rows // 2, rows),), None)


def quarters(rows: int) -> LinearPlan:
    """A quarter each on the host, streamed twice, and resident."""
    step = rows // 4
    return LinearPlan(rows, step, ((step, 2 * step), (2 * step, 3 * step)), (3 * step, rows))


def planned(
    function: Callable[..., Any],
    *inputs: Any,
    plan: Callable[[int], LinearPlan] = halves,
    ring_bytes: int = 2**20,
    whole_graph: bool = False,
    paired: float = 0.0,
    experts: Callable[[int], LinearPlan] | None = None,
    **changes: Any,
) -> Case:
    """A case up to ``group_segments`` in which every Linear's rows are divided by ``plan``.

    ``experts`` divides those of every stack, which is streamed then. ``paired``: the share of the blocks' columns that
    is on the host; 0: no blocks are cut as such.
    """
    result = case(function, *inputs, **changes).run(annotate_costs)
    linears = result.nodes(ir.LINEAR)
    rows = {info(node).position: int(info(node.args[1]).value.shape[0]) for node in linears}
    result.context = replace(
        result.context,
        residency=Residency({}, ring_bytes, ring_bytes, {"activations": 0, GROWTH: 0}, whole_graph=whole_graph),
        splits={position: plan(count) for position, count in rows.items()},
    )
    by_position = {info(node).position: node for node in linears}
    splits = dict(result.context.splits or {})
    for block in result.context.blocks if paired else ():
        splits |= block_splits(block, by_position, round(paired * block.columns), result.context)
    result.context = replace(result.context, splits=splits)
    if experts is not None:
        _stream(result, experts)
    result.apply(place_nodes)
    result.apply(group_segments)
    return result


def _stream(found: Case, plan: Callable[[int], LinearPlan]) -> None:
    stacks = [node for node in found.module.graph.find_nodes(op="placeholder") if products_with(node)]
    residency = require(found.context.residency, "planned")
    residency = replace(residency, streamed_stacks=frozenset(node.name for node in stacks))
    found.context = replace(found.context, residency=residency)
    found.apply(stream_experts)
    more = {info(node).position: plan(int(info(node.args[1]).value.shape[0])) for node in found.nodes(ir.GROUPED)}
    found.context = replace(found.context, splits={**(found.context.splits or {}), **more})


def scheduled(function: Callable[..., Any], *inputs: Any, **changes: Any) -> Case:
    """A case up to ``schedule`` whose Linears are divided as ``planned`` says."""
    result = planned(function, *inputs, **changes)
    for stage in (split_linears, split_experts, insert_transfers, schedule):
        result.apply(stage)
    return result


def least_s(prediction: Prediction) -> float:
    """What no order of a prediction's work comes below, with everything carried there and nothing started for later."""
    work = {n: w for n, w in prediction.work.items() if n.target not in (ir.CARRIED, ir.PREFETCH_AHEAD)}
    place = {node: position for position, node in enumerate(work)}
    tasks = [
        Task(
            node.name,
            own.resource,
            own.seconds,
            tuple(place[n] for n in node.all_input_nodes if n in place),
            own.issue_s,
        )
        for node, own in work.items()
    ]
    return lower_bound_s(tasks)


def assert_equal_to_eager(
    function: Callable[..., Any], *inputs: Tensor, plan: Callable[[int], LinearPlan] = quarters, **changes: Any
) -> Case:
    """Outputs and written inputs of the scheduled graph are eager's, and something was really split and moved."""
    own, eager = ([x.clone() for x in inputs] for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        expected = function(*eager)
    found = scheduled(function, *own, plan=plan, **changes)
    assert found.nodes(ir.HOST_LINEAR)
    assert found.nodes(ir.PREFETCH)
    torch.manual_seed(0)
    actual = found.outputs()
    torch.testing.assert_close(tuple(actual), expected if isinstance(expected, tuple) else (expected,))
    torch.testing.assert_close(own, eager)
    return found


# ---- the IR as text ----------------------------------------------------------------------------------------


def ir_text(graph: fx.Graph) -> str:
    """One line per node: t1, t2, ... for values, inputs by the names that the user knows."""
    names: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = source_name(node) or node.name
        elif node.op == "output":
            lines.append(f"return {_operand(node.args[0], names)}")
        else:
            names[node] = f"t{len(lines) + 1}"
            lines.append(f"{names[node]} = {_call(node, names)}")
    return "\n".join(lines)


def _call(node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.op == "get_attr":
        return str(node.target)
    given = [_operand(arg, names) for arg in node.args]
    given += [f"{key}={_operand(value, names)}" for key, value in node.kwargs.items()]
    if node.target is operator.getitem:
        return f"{given[0]}[{given[1]}]"
    if node.op == "call_method":
        return f"{given[0]}.{node.target}({', '.join(given[1:])})"
    return f"{_function_name(node.target)}({', '.join(given)})"


def _function_name(target: Any) -> str:
    if target == ir.LINEAR:
        return "hetegen.linear"
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    return str(getattr(target, "__name__", target))


def _operand(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        items = ", ".join(_operand(item, names) for item in value)
        if isinstance(value, list):
            return f"[{items}]"
        return f"({items},)" if len(value) == 1 else f"({items})"
    return str(value)
