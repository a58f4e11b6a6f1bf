"""Folding of the schedule table: rows of equal layers become one line.

Two rows are equal when their module paths differ in at most one number (``layers.0.mlp``, ``layers.1.mlp``)
and their figures agree: predicted times within 1 %, everything else exactly. Where a path holds several
numbers they are folded one after the other, the leftmost first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isclose

from hetegen_compile.rows import Row

SOME_OF = " of "
"""In the place of a set of layers that is too long to write out: ``{18 of 0..29}``."""

_SET_WIDTH = 13
_TIME_TOLERANCE = 0.01


@dataclass(frozen=True)
class Line:
    """One line of the table: a row, or equal rows folded.

    ``path`` is the module's path, a folded number in it as ``{0..29}``. ``rows`` are those that the line
    stands for, in their order.
    """

    path: tuple[str, ...]
    rows: tuple[Row, ...]


def unfolded(rows: Sequence[Row]) -> list[Line]:
    """One line for each row."""
    return [Line(tuple(row.module.split(".")), (row,)) for row in rows]


def fold(rows: Sequence[Row]) -> list[Line]:
    """Lines for ``rows``, equal ones as one line, in the order of each line's first row."""
    lines = unfolded(rows)
    depth = max((len(line.path) for line in lines), default=0)
    for position in range(depth):
        lines = _fold_at(lines, position)
    return lines


def _fold_at(lines: Iterable[Line], position: int) -> list[Line]:
    groups: dict[tuple[object, ...], list[list[Line]]] = {}
    order: list[list[Line]] = []
    for line in lines:
        candidates = groups.setdefault(_pattern(line, position), [])
        group = next((found for found in candidates if _same_times(found[0].rows[0], line.rows[0])), None)
        if group is None:
            group = []
            candidates.append(group)
            order.append(group)
        group.append(line)
    return [_merge(group, position) for group in order]


def _pattern(line: Line, position: int) -> tuple[object, ...]:
    """Everything but times that folded lines have in common."""
    row, path = line.rows[0], line.path
    if _has_number(path, position):
        path = (*path[:position], "*", *path[position + 1 :])
    shares = (row.host_share, row.streamed_share, row.resident_share)
    return path, row.op, row.placement, shares, row.flops, row.weight_bytes


def _has_number(path: tuple[str, ...], position: int) -> bool:
    return position < len(path) and path[position].isdecimal()


def _same_times(one: Row, other: Row) -> bool:
    pairs = zip(
        (one.host_s, one.accelerator_s, one.link_s),
        (other.host_s, other.accelerator_s, other.link_s),
        strict=True,
    )
    return all(isclose(a, b, rel_tol=_TIME_TOLERANCE, abs_tol=1e-12) for a, b in pairs)


def _merge(group: list[Line], position: int) -> Line:
    path = group[0].path
    if _has_number(path, position):
        numbers = sorted({int(line.path[position]) for line in group})
        path = (*path[:position], _number_set(numbers), *path[position + 1 :])
    return Line(path, tuple(row for line in group for row in line.rows))


def _number_set(numbers: list[int]) -> str:
    """Sorted numbers as ``7``, ``{0..29}``, ``{0..2,5..9}`` or, with a step, ``{0,2..28}``; else ``{18 of 0..29}``."""
    if len(numbers) == 1:
        return str(numbers[0])
    step = numbers[1] - numbers[0]
    if step > 1 and len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1, step)):
        return f"{{{numbers[0]},{numbers[1]}..{numbers[-1]}}}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) + "}"
    return text if len(text) <= _SET_WIDTH else f"{{{len(numbers)}{SOME_OF}{numbers[0]}..{numbers[-1]}}}"
