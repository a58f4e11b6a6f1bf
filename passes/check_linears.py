"""Each Linear of the program is computed with its own operands, and its parts are put together once, where they belong.

Why: with other activations, a bias that is added twice or a part that is left out of a sum, each node is a correct
operation and the result is wrong. ``check_parts`` looks at which elements of the weight the parts use; here they are
held against what the captured program multiplies (``Effects.linears``), and what joins them against the parts.

Parts along the outputs are columns of the result, side by side in their order, each with its columns of the bias.
Parts along the inputs are summed in any order, and one of them has the bias. The accelerator's parts of a block's
first Linears are padded, not joined; the host's part of its last one reads as many columns as it multiplies with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from torch import fx

from hetegen_compile import ir
from hetegen_compile.errors import ScheduleError
from hetegen_compile.ir import info
from hetegen_compile.linear_parts import whole_linear
from hetegen_compile.operands import linear_part
from hetegen_compile.passes.check_parts import brought, origin
from hetegen_compile.passes.findings import LinearOperands
from hetegen_compile.passes.happens_before import name_of

_PARTS = (ir.HOST_LINEAR, ir.PARTIAL_LINEAR)


def check_linears(graph: fx.Graph, program: Mapping[int, LinearOperands], segments: Iterable[fx.Graph] = ()) -> None:
    """Check all parts of Linears, what they read and what puts them together.

    ``segments`` have Linears, whole, only where everything stays on the accelerator.

    Raises:
        ScheduleError: operands are not the program's, the bias is not added once, a part is joined elsewhere, twice or
            not at all, or a Linear has none.
    """
    parts: dict[int, list[fx.Node]] = {}
    wholes: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target in _PARTS:
            parts.setdefault(info(node).position, []).append(node)
        elif node.target in (ir.JOIN, ir.PAD) and info(node).position in program:
            wholes.setdefault(info(node).position, []).append(node)
    for position, nodes in parts.items():
        if position not in program:
            raise ScheduleError(f"verify: {name_of(nodes[0])} is part of no Linear of the program")
        _check_operands(nodes, program[position])
        _check_bias(nodes, program[position])
        _check_wholes(nodes, wholes.get(position, []))
    whole = {info(node).position for inner in segments for node in inner.nodes if node.target is whole_linear}
    if missing := program.keys() - parts.keys() - whole:
        raise ScheduleError(f"verify: of the Linear at {min(missing)} in the program no part is computed")


def _check_operands(parts: Sequence[fx.Node], program: LinearOperands) -> None:
    for part in parts:
        operands, weight = linear_part(part), _weight(part)
        if (info(weight).position, operands.dim) != (program.weight, program.dim):
            raise ScheduleError(f"verify: {name_of(part)} multiplies with {weight}, which is not the program's weight")
        x = origin(operands.x)
        if not (_is_whole(part) and info(x).position == program.x) and not _reads_columns(part):
            raise ScheduleError(f"verify: {name_of(part)} multiplies {x}, which the program does not there")


def _is_whole(part: fx.Node) -> bool:
    """Whether a part reads all columns of the activations, where their number is known."""
    operands = linear_part(part)
    columns = info(operands.x).value.shape[-1]
    return type(columns) is not int or columns == info(_weight(part)).value.shape[1 - operands.dim]


def _reads_columns(part: fx.Node) -> bool:
    """Whether it is the host's of a cut block's last Linear, and what it reads has as many columns as it takes."""
    operands = linear_part(part)
    columns = info(operands.x).value.shape[-1]
    return part.target == ir.HOST_LINEAR and operands.sums and operands.lo == 0 and columns == operands.hi


def _check_bias(parts: Sequence[fx.Node], program: LinearOperands) -> None:
    biased = [part for part in parts if linear_part(part).bias is not None]
    for part in biased:
        bias = origin(linear_part(part).bias)
        if info(bias).position != program.bias:
            raise ScheduleError(f"verify: {name_of(part)} adds {bias}, which is not the program's bias")
    due = 0 if program.bias is None else 1 if linear_part(parts[0]).sums else len(parts)
    if len(biased) != due:
        raise ScheduleError(
            f"verify: {len(biased)} of {', '.join(map(name_of, parts))} add the bias, which {due} of them are to add"
        )


def _check_wholes(parts: Sequence[fx.Node], wholes: Sequence[fx.Node]) -> None:
    """The last of ``wholes`` is the result; others before it are part of it."""
    if not wholes and all(part.target == ir.HOST_LINEAR for part in parts):
        return  # a block's first Linear that the host has whole: what its parts become is read by the last one's
    whole = wholes[-1] if wholes else None
    due = parts if whole is None or whole.target == ir.JOIN else [p for p in parts if p.target == ir.PARTIAL_LINEAR]
    found = list(_leaves(whole)) if whole is not None else []
    if sorted(map(str, found)) != sorted(map(str, due)):
        raise ScheduleError(
            f"verify: what {', '.join(map(name_of, due))} make is not what is put together in {whole}; "
            f"missing edge: {due[-1]} -> {whole}"
        )
    for join in wholes:
        if join.target == ir.JOIN:
            _check_join(join)


def _leaves(whole: fx.Node) -> Iterator[fx.Node]:
    """The parts that a join or a pad puts together, through the joins within it."""
    for one in map(origin, _operands(whole)):
        if one.target == ir.JOIN:
            yield from _leaves(one)
        else:
            yield one


def _operands(whole: fx.Node) -> Sequence[fx.Node]:
    found: Sequence[fx.Node] = whole.args[0 if whole.target == ir.JOIN else 1]  # type: ignore[assignment]
    return found


def _check_join(join: fx.Node) -> None:
    """What is put side by side is in the order of its columns, what is summed is all of the same columns."""
    columns = [_columns(one) for one in map(origin, _operands(join))]
    summed = join.args[1] == 1
    wrong = len({*columns}) > 1 if summed else any(end != start for (_, end), (start, _) in pairwise(columns))
    if wrong:
        raise ScheduleError(
            f"verify: {name_of(join)} {'adds' if summed else 'puts side by side'} columns "
            f"{', '.join(f'{lo}:{hi}' for lo, hi in columns)}"
        )


def _columns(one: fx.Node) -> tuple[int, int]:
    """Which columns of the Linear's result a part or a join has."""
    if one.target == ir.JOIN:
        ranges = [_columns(origin(operand)) for operand in _operands(one)]
        return ranges[0][0], ranges[-1][1]
    operands = linear_part(one)
    if not operands.sums:
        return operands.lo, operands.hi
    if one.target == ir.PARTIAL_LINEAR and operands.dim == 0:
        rows = brought(operands.weight)
        return rows.top, rows.bottom
    return 0, int(info(_weight(one)).value.shape[operands.dim])


def _weight(part: fx.Node) -> fx.Node:
    weight: fx.Node = linear_part(part).weight
    return weight if part.target == ir.HOST_LINEAR else brought(weight).weight


__all__ = ["check_linears"]
