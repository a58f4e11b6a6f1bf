"""Bind a lowered schedule to an accelerator: one straight-line Python function for a step.

Every node of the schedule becomes one line that calls a method of the accelerator with a prepared ``Op``,
prepared slots and the values of earlier lines; values are dropped after their last use. Nothing goes
through torch's dispatcher but the work itself.

    def step(inputs, mirrors, residents, carried=(), ahead=None):
        w = inputs[3]
        t = prefetch(op_1, w[64:128], slot_1, ())
        d = to_host(op_2, [mirrors[0]])
        u = carried[0] or prefetch(op_5, w2[0:64], slot_2, ())
        s = launch(op_3, linear_3, (mirrors[0], wait(op_4, t), None))
        ...
        _given = [a, v]
        (b, c) = launch_chain(chain_1, _given)      # launches that follow each other: ``chains.py``
        _run_1 = host(op_7, program_1, (w3[0:64], v), {})     # of host parts and what lies between: ``host_runs.py``
        p = _run_1[0]
        ...
        ahead(0, op_6, w2, w2[0:64], slot_2, (r1,))
        return (y,), [(host, device), ...]
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from hetegen_compile import ir
from hetegen_compile.accelerators.base import Accelerator, Op, Slot
from hetegen_compile.cost_model import KernelChoice
from hetegen_compile.errors import ScheduleError
from hetegen_compile.host_kernels import HostLinear, bind_kernels
from hetegen_compile.ir import info
from hetegen_compile.linear_parts import behind_usual_strides, join_parts, pad_parts, rows_function
from hetegen_compile.operands import grouped_part, host_groups, linear_part
from hetegen_compile.passes.closed_gates import sizes_behind_gates
from hetegen_compile.passes.context import Refusal
from hetegen_compile.passes.findings import Work
from hetegen_compile.passes.lower import CompiledSegment
from hetegen_compile.passes.resolve_sizes import size_inputs
from hetegen_compile.passes.schedule import pinned_ring_bytes
from hetegen_compile.passes.tensors import tensors_in
from hetegen_compile.steps.bound_step import BoundStep
from hetegen_compile.steps.chains import ChainLines, ChainRules
from hetegen_compile.steps.expert_products import accelerators_groups, bind_host_groups, whole_product
from hetegen_compile.steps.host_functions import host_function, in_place
from hetegen_compile.steps.host_runs import HostRun, dying_behind, host_runs
from hetegen_compile.steps.last_uses import last_uses
from hetegen_compile.steps.like import like_text
from hetegen_compile.steps.longer_caches import LongerCaches
from hetegen_compile.steps.step_source import StepSource

logger = logging.getLogger("hetegen_compile")


def bind(
    module: fx.GraphModule,
    work: Mapping[fx.Node, Work],
    accelerator: Accelerator,
    kernels: Mapping[str, KernelChoice] = MappingProxyType({}),
    workspace_bytes: Mapping[fx.Node, int] = MappingProxyType({}),
    *,
    chains: bool = True,
    ahead_bytes: int = 0,
    room_tokens: Callable[[Tensor], int] = lambda cache: 0,
) -> BoundStep:
    """Generate the step function of a lowered schedule for one accelerator.

    Host parts are computed by ``kernels``: those of the hardware profile, by dtype; without one by ``F.linear``.
    ``workspace_bytes`` are what nodes occupy while they run beside arguments and results. ``chains``: launches that
    follow each other are functions of their own. ``ahead_bytes``: of the profile, for host programs. ``room_tokens``:
    for how many tokens there is room where the step makes a cache.
    """
    rules = ChainRules(module, allowed=chains)
    return _Binder(module, work, accelerator, kernels, workspace_bytes, rules, ahead_bytes, room_tokens).bind()


_NO_WORK = Work("host", 0.0)

_METHODS = (
    "stage", "prefetch", "wait", "release", "to_host", "wait_host", "to_accelerator", "launch", "host",
    "receive", "host_ahead", "deliver", "caught_up", "launch_chain", "lengthen", "new_cache",
)  # fmt: skip


class _Binder:
    def __init__(
        self,
        module: fx.GraphModule,
        work: Mapping[fx.Node, Work],
        accelerator: Accelerator,
        kernels: Mapping[str, KernelChoice],
        workspace_bytes: Mapping[fx.Node, int],
        rules: ChainRules,
        ahead_bytes: int,
        room_tokens: Callable[[Tensor], int],
    ) -> None:
        self._kernels = kernels
        self._refusals: dict[Refusal, None] = {}
        self._module = module
        self._work = work
        self._workspace_bytes = workspace_bytes
        self._accelerator = accelerator
        self._inputs = module.graph.find_nodes(op="placeholder")
        self._position = {node: position for position, node in enumerate(self._inputs)}
        self._source = StepSource({name: getattr(accelerator, name) for name in _METHODS})
        self._text, self._constant = self._source.text, self._source.constant
        self._written = ir.written_storages(node for node in module.graph.nodes if info(node).side == "accelerator")
        self._rules = rules
        self._ahead_bytes = ahead_bytes
        self._longer = LongerCaches(self._source, self._position, self._place_of_size, room_tokens)
        self._mirrors: list[fx.Node] = []
        self._residents: list[tuple[int, int, int]] = []
        self._carried = module.graph.find_nodes(op="call_function", target=ir.CARRIED)
        self._ahead = module.graph.find_nodes(op="call_function", target=ir.PREFETCH_AHEAD)
        self._pinned_ring_bytes = pinned_ring_bytes(module.graph)

    def bind(self) -> BoundStep:
        self._accelerator.reserve_pinned(self._pinned_ring_bytes)
        self._linears = {node: self._kernel(node) for node in self._module.graph.nodes if node.target == ir.HOST_LINEAR}
        native = {node: kernel for node, kernel in self._linears.items() if not kernel.is_torchs}
        runs = {run.nodes[-1]: run for run in host_runs(self._module.graph, native, self._ahead_bytes)}
        dying = dying_behind(last_uses(self._module.graph), runs.values())
        chain = ChainLines(self._source, self._rules, dying)
        inside = {node for run in runs.values() for node in run.nodes}
        for node in self._module.graph.nodes:
            if node in runs:
                chain.add(node, self._run(runs[node]))
            elif node not in inside:
                chain.add(node, self._line(node))
        run, source = self._source.function()
        settled, outdated = self._written_inputs()
        return BoundStep(
            run=run,
            mirrors=tuple(self._position[node] for node in self._mirrors),
            residents=tuple(self._residents),
            settled=settled,
            outdated=outdated,
            streamed=self._streamed(),
            sizes=self._sizes_behind_gates(),
            carried=tuple(self._position[node.args[0]] for node in self._carried),
            pinned_ring_bytes=self._pinned_ring_bytes,
            chains=self._source.chains,
            longer=tuple(self._longer.found),
            in_turn=not any(info(node).ahead for node in self._module.graph.nodes),
            source=source,
            refusals=tuple(self._refusals),
        )

    def _sizes_behind_gates(self) -> tuple[int, ...]:
        found = sizes_behind_gates(self._module)
        return tuple(self._position[node] for size, node in size_inputs(self._module.graph).items() if size in found)

    def _written_inputs(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The inputs that the host writes: those that the accelerator writes alike, and those that it does not."""
        host = frozenset[int]().union(
            *(info(node).writes for node in self._module.graph.nodes if info(node).side == "host")
        )
        written = [i for i, node in enumerate(self._inputs) if info(node).storages & host]
        both = [i for i in written if info(self._inputs[i]).storages & self._written]
        return tuple(both), tuple(i for i in written if i not in both)

    def _streamed(self) -> tuple[int, ...]:
        prefetches = self._module.graph.find_nodes(op="call_function", target=ir.PREFETCH) + self._carried
        return tuple(sorted({self._position[node.args[0]] for node in prefetches if node.args[0].target != ir.STAGE}))

    def _op(self, node: fx.Node, category: str = "activations", arguments: tuple[Any, ...] = ()) -> str:
        work = self._work.get(node, _NO_WORK)
        tensors = tuple(i for i, one in enumerate(arguments) if isinstance(one, fx.Node) and ir.is_tensor(one))
        workspace_bytes = self._workspace_bytes.get(node, 0)
        return self._constant("op", Op(node.name, work.seconds, category, workspace_bytes, tensors, work.issue_s))

    # ---- one line a node -------------------------------------------------------------------------------------

    def _line(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return f"{node.name} = inputs[{self._position[node]}]" if node.users else ""
        if node.op == "get_attr":
            return f"{node.name} = {self._constant('attribute', _attribute(self._module, str(node.target)))}"
        if node.op == "output":
            return f"return {self._text(node.args[0])}, twins"
        if node.op == "call_module":
            return self._segment(node)
        emit = _EMITTERS.get(node.target)
        return emit(self, node) if emit is not None else self._host_operation(node)

    def _segment(self, node: fx.Node) -> str:
        segment = self._module.get_submodule(str(node.target))
        if not isinstance(segment, CompiledSegment):
            raise ScheduleError(f"{node.name} has not been lowered")
        function = self._constant("segment", segment.function)
        options = f"outputs={segment.outputs}, mutates={segment.mutates!r}"
        arguments = _arguments(node)
        launch = f"launch({self._op(node, arguments=arguments)}, {function}, {{arguments}}, {options})"
        if segment.appended:
            return self._longer.lines(node, segment, launch)
        return f"{node.name} = {launch.format(arguments=self._text(arguments))}"

    def _mirror(self, node: fx.Node) -> str:
        self._mirrors.append(node.all_input_nodes[0])
        return f"{node.name} = mirrors[{len(self._mirrors) - 1}]"

    def _resident(self, node: fx.Node) -> str:
        weight, lo, hi = _arguments(node)
        self._residents.append((self._position[weight], lo, hi))
        return f"{node.name} = residents[{len(self._residents) - 1}]"

    def _stage(self, node: fx.Node) -> str:
        op, read, slot = self._into_slot(node, self._accelerator.pinned_slot)
        return f"{node.name} = stage({op}, {read}, {slot}, {self._text(tuple(_arguments(node)[4]))})"

    def _prefetch(self, node: fx.Node) -> str:
        op, read, slot = self._into_slot(node, self._accelerator.slot)
        return f"{node.name} = prefetch({op}, {read}, {slot}, {self._text(tuple(_arguments(node)[4]))})"

    def _take_over(self, node: fx.Node) -> str:
        op, read, slot = self._into_slot(node, self._accelerator.slot)
        return f"{node.name} = carried[{self._carried.index(node)}] or prefetch({op}, {read}, {slot}, ())"

    def _prefetch_ahead(self, node: fx.Node) -> str:
        index = self._ahead.index(node)
        if self._carried[index].args != node.args[:4]:
            raise ScheduleError(f"{node.name} does not start what {self._carried[index].name} takes over")
        weight, *_, after = _arguments(node)
        op, read, slot = self._into_slot(node, self._accelerator.slot)
        return f"ahead({index}, {op}, {weight}, {read}, {slot}, {self._text(tuple(after))})"

    def _into_slot(self, node: fx.Node, slot_at: Callable[..., Slot]) -> tuple[str, str, str]:
        """Texts of the operation, what it reads and its slot; of a stage a prefetch reads all that it copied."""
        source, ranges, dim, offset = _arguments(node)[:4]
        (rows,) = tensors_in(info(node).value)
        slot = slot_at(offset, tuple(map(int, rows.shape)), rows.dtype)
        read = source.name if source.target == ir.STAGE else _narrowed(source, ranges, dim)
        return self._op(node, "weights"), read, self._constant("slot", slot)

    def _plain(self, node: fx.Node) -> str:
        name = "wait" if node.target == ir.WAIT_ACCELERATOR else str(node.target).split(".")[1]
        if info(node).ahead and node.target == ir.WAIT_HOST:
            name = "receive"
        return f"{node.name} = {name}({self._op(node)}, {self._text(node.args[0])})"

    def _to_accelerator(self, node: fx.Node) -> str:
        if not info(node).ahead:
            return self._plain(node)
        made_like = like_text(tensors_in(info(node).value), self._constant, self._place_of_size)
        return f"{node.name} = deliver({self._op(node)}, {self._text(node.args[0])}, {made_like})"

    def _place_of_size(self, symbol: sympy.Symbol) -> int:
        return self._position[size_inputs(self._module.graph)[symbol]]

    def _caught_up(self, node: fx.Node) -> str:
        return f"caught_up({self._op(node)}, {self._text(node.args[0])})"

    def _host_call(self, node: fx.Node, function: str, arguments: str, keywords: str = "{}") -> str:
        call = "host_ahead" if info(node).ahead else "host"
        return f"{node.name} = {call}({self._op(node)}, {function}, {arguments}, {keywords})"

    def _partial(self, node: fx.Node) -> str:
        x, rows, bias, lo, hi, dim, axis = linear_part(node)
        function = self._constant("linear", rows_function(lo, hi, dim, axis, biased=bias is not None))
        op = self._op(node, arguments=(x, rows, bias))
        return f"{node.name} = launch({op}, {function}, {self._text((x, rows, bias))})"

    def _partial_grouped(self, node: fx.Node) -> str:
        part, (bounds, function) = grouped_part(node), accelerators_groups(node)
        op = self._op(node, arguments=(part.x, part.matrices, None, part.others))
        read = f"{self._constant('bounds', bounds)}({part.ends})"
        arguments = f"({part.x}, {part.matrices}, {read}, {self._text(part.others)})"
        return f"{node.name} = launch({op}, {self._constant('grouped', function)}, {arguments})"

    def _host_grouped(self, node: fx.Node) -> str:
        part = host_groups(node)
        function = self._constant("groups", bind_host_groups(node, self._kernels, self._refuse))
        return self._host_call(node, function, self._text((part.x, part.stack, part.ends)))

    def _kernel(self, node: fx.Node) -> HostLinear:
        _, weight, _, lo, hi, dim, axis = linear_part(node)
        return bind_kernels(self._kernels, info(weight).value, lo, hi, dim, self._refuse, axis)

    def _run(self, run: HostRun) -> str:
        """The lines of a run: one call, and the names of its results."""
        last, name = run.nodes[-1], f"_run_{run.nodes[-1].name}"
        arguments = [
            self._rows(run.rows[index]) if index in run.rows else node.name for index, node in enumerate(run.given)
        ]
        works = [self._work.get(node, _NO_WORK) for node in run.nodes]
        parts = tuple(node.name for node in run.nodes)
        seconds, issue_s = sum(work.seconds for work in works), sum(work.issue_s for work in works)
        op = Op(last.name, seconds, issue_s=issue_s, parts=parts, shares=run.program.shares)
        call = "host_ahead" if info(last).ahead else "host"
        names = self._constant("op", op), self._constant("program", run.program)
        called = f"{call}({', '.join(names)}, ({', '.join(arguments)},), {{}})"
        results = [f"{node.name} = {name}[{index}]" for index, node in enumerate(run.results)]
        return "\n    ".join([f"{name} = {called}", *results, f"del {name}"])

    def _rows(self, node: fx.Node) -> str:
        part = linear_part(node)
        return _narrowed(part.weight, [part.lo, part.hi], part.axis)

    def _host_linear(self, node: fx.Node) -> str:
        """One that torch computes; those of our own kernels are in runs."""
        x, weight, bias, lo, hi, dim, axis = linear_part(node)
        rows = rows_function(lo, hi, dim, axis, biased=bias is not None)
        bfloat16 = info(weight).value.dtype is torch.bfloat16
        function = self._constant("linear", behind_usual_strides(rows) if bfloat16 else rows)
        arguments = f"({x}, {self._rows(node)}, {self._text(bias)})"
        return self._host_call(node, function, arguments)

    def _refuse(self, reason: str, where: str = "host Linears") -> None:
        refusal = Refusal(where, reason)
        if refusal not in self._refusals:
            logger.warning("%s: %s", refusal.where, reason)
            self._refusals[refusal] = None

    def _join(self, node: fx.Node) -> str:
        parts, dim = _arguments(node)
        if self._rules.passes_on(node):
            return f"{node.name} = {parts[0]}"
        if len(parts) == 1:
            return f"{node.name} = launch({self._op(node)}, {self._constant('clone', torch.clone)}, ({parts[0]},))"
        join = functools.partial(torch.cat if dim == 0 else join_parts, dim=-1 if dim == 0 else dim)
        function = self._constant("join", join)
        return f"{node.name} = launch({self._op(node)}, {function}, ({self._text(list(parts))},))"

    def _pad(self, node: fx.Node) -> str:
        x, parts, starts, columns = _arguments(node)
        function = self._constant("pad", functools.partial(pad_parts, starts=starts, columns=columns))
        return f"{node.name} = launch({self._op(node)}, {function}, ({x}, {self._text(list(parts))}))"

    def _write_back(self, node: fx.Node) -> str:
        function = self._constant("write", in_place(Tensor.copy_))
        return f"host({self._op(node)}, {function}, {self._text(tuple(node.args))}, {{}})"

    def _twin(self, node: fx.Node) -> str:
        return f"twins.append({self._text(tuple(node.args))})"

    def _getitem(self, node: fx.Node) -> str:
        source, index = _arguments(node)
        if info(source).side == "accelerator" or source.target in (ir.WAIT_HOST, ir.WAIT_ACCELERATOR):
            return f"{node.name} = {source}[{self._text(index)}]"
        return self._host_operation(node)

    def _host_operation(self, node: fx.Node) -> str:
        arguments, keywords = self._text(tuple(node.args)), self._text(dict(node.kwargs))
        name = self._constant("function", host_function(node, whole_product(node, self._kernels, self._refuse)))
        if not info(node).ahead and not info(node).aten and not info(node).writes and not tensors_in(info(node).value):
            return f"{node.name} = {name}(*{arguments}, **{keywords})"
        return self._host_call(node, name, arguments, keywords)


_EMITTERS: dict[Any, Callable[[_Binder, fx.Node], str]] = {
    ir.MIRROR: _Binder._mirror,
    ir.RESIDENT: _Binder._resident,
    ir.STAGE: _Binder._stage,
    ir.PREFETCH: _Binder._prefetch,
    ir.CARRIED: _Binder._take_over,
    ir.PREFETCH_AHEAD: _Binder._prefetch_ahead,
    ir.WAIT: _Binder._plain,
    ir.RELEASE: _Binder._plain,
    ir.TO_HOST: _Binder._plain,
    ir.WAIT_HOST: _Binder._plain,
    ir.TO_ACCELERATOR: _Binder._to_accelerator,
    ir.CAUGHT_UP: _Binder._caught_up,
    ir.WAIT_ACCELERATOR: _Binder._plain,
    ir.PARTIAL_LINEAR: _Binder._partial,
    ir.PARTIAL_GROUPED: _Binder._partial_grouped,
    ir.HOST_GROUPED: _Binder._host_grouped,
    ir.HOST_LINEAR: _Binder._host_linear,
    ir.JOIN: _Binder._join,
    ir.PAD: _Binder._pad,
    ir.WRITE_BACK: _Binder._write_back,
    ir.TWIN: _Binder._twin,
    operator.getitem: _Binder._getitem,
}


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.args)


def _narrowed(weight: fx.Node, ranges: Sequence[int], dim: int) -> str:
    if dim == ir.RECTANGLE:
        first, end, left, right = ranges
        return f"{weight}[{first}:{end}, {left}:{right}]"
    lo, hi = ranges
    return f"{weight}[:, {lo}:{hi}]" if dim else f"{weight}[{lo}:{hi}]"


def _attribute(module: fx.GraphModule, target: str) -> Any:
    return functools.reduce(getattr, target.split("."), module)
