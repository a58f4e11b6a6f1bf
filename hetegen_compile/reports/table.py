"""The schedule as text: one line for each Linear, segment and host operation, equal layers folded into one.

A folded line (``x30``) shows the figures of the first of its rows, the interval included, and the mean of the
measured times.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from math import floor, log10
from statistics import fmean

from tabulate import SEPARATING_LINE, DataRow, TableFormat, tabulate
from tabulate import Line as Rule

from hetegen_compile.options import format_bytes
from hetegen_compile.reports.fold import SOME_OF, Line, fold, unfolded
from hetegen_compile.reports.verdict import BASELINE_NAMES, verdict
from hetegen_compile.rows import Row, Totals

WIDTH = 120
"""Columns of text that the table keeps to; long module paths wrap."""

_SOME_OF_NOTE = "{n of a..b}: n of the layers from a to b; the option unfold, or table(unfold=True), shows each"

_LEAST_NAME_WIDTH = 20
_OP_WIDTH = 11

_NAME_CUTS = re.compile(r"(?<!\.)(?=\.[^.])|(?<=,)")
"""Before a module's dot and behind a comma, but not in a range (``5..8``)."""
_OP_CUTS = re.compile("(?=_)")

_FORMAT = TableFormat(
    lineabove=None, linebelowheader=Rule("", "-", " ", ""), linebetweenrows=None, linebelow=None,
    headerrow=None, datarow=DataRow("", " ", ""), padding=0, with_header_hide=None,
)  # fmt: skip
"""One space between columns. Headers are rows (tabulate pads headers proper), SEPARATING_LINE is the rule."""


def schedule_table(rows: Sequence[Row], totals: Totals, *, title: str, unfold: bool = False) -> str:
    """Render a schedule in at most 120 columns.

    Times are milliseconds of one step, work is GFLOP, weights are MiB; shares are per cent of a Linear's rows
    computed on the host, streamed over the link and resident. A row without a module shows its node's name.

    Args:
        rows: in the order in which their work starts.
        totals: what stands at the bottom.
        title: the first line.
        unfold: show every row instead of folding equal ones.
    """
    lines = unfolded(rows) if unfold else fold(rows)
    some = any(SOME_OF in part for line in lines for part in line.path)
    notes = ["", _SOME_OF_NOTE] if some else []
    return "\n".join([title, "", _render(lines), *notes, "", _render_totals(totals)])


# ---- cells ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    header: str
    unit: str
    cell: Callable[[Line], str]
    align: str = "right"


def _amount(line: Line, field: str, unit: float, decimals: int = 3) -> str:
    """A figure of one row in ``unit``; empty for nothing."""
    return _three_digits(getattr(line.rows[0], field) / unit, decimals)


def _three_digits(value: float, most_decimals: int = 3) -> str:
    if value == 0:
        return ""
    decimals = min(most_decimals, max(0, 2 - floor(log10(abs(value)))))
    text = f"{value:.{decimals}f}"
    return text if float(text) else "~0"


def _share(line: Line, field: str) -> str:
    share: float | None = getattr(line.rows[0], field)
    return "" if share is None else f"{100 * share:.0f}"


def _instant(line: Line, field: str) -> str:
    return f"{1e3 * getattr(line.rows[0], field):.2f}"


def _measured(line: Line) -> str:
    times = [row.measured_s for row in line.rows if row.measured_s is not None]
    return _three_digits(1e3 * fmean(times)) if times else ""


def _count(line: Line) -> str:
    return f"x{len(line.rows)}" if len(line.rows) > 1 else ""


def _name(line: Line) -> str:
    if line.path != ("",):
        return ".".join(line.path)
    return line.rows[0].node + (", ..." if len(line.rows) > 1 else "")


def _where(line: Line) -> str:
    placement = line.rows[0].placement
    return "accel" if placement == "accelerator" else placement


_COLUMNS = (
    _Column("module", "", _name, "left"),
    _Column("", "", _count),
    _Column("op", "", lambda line: line.rows[0].op, "left"),
    _Column("where", "", _where, "left"),
    _Column("host", "%", partial(_share, field="host_share")),
    _Column("link", "%", partial(_share, field="streamed_share")),
    _Column("res.", "%", partial(_share, field="resident_share")),
    _Column("work", "GFLOP", partial(_amount, field="flops", unit=1e9, decimals=4)),
    _Column("weight", "MiB", partial(_amount, field="weight_bytes", unit=2**20)),
    _Column("host", "ms", partial(_amount, field="host_s", unit=1e-3)),
    _Column("accel", "ms", partial(_amount, field="accelerator_s", unit=1e-3)),
    _Column("link", "ms", partial(_amount, field="link_s", unit=1e-3)),
    _Column("start", "ms", partial(_instant, field="start_s")),
    _Column("end", "ms", partial(_instant, field="end_s")),
)
_MEASURED = _Column("measured", "ms", _measured)


# ---- rendering -----------------------------------------------------------------------------------------


def _render(lines: list[Line]) -> str:
    columns = list(_COLUMNS)
    if any(row.measured_s is not None for line in lines for row in line.rows):
        columns.append(_MEASURED)
    cells = [[column.cell(line) for column in columns] for line in lines]
    without_names = _grid(columns[1:], [cut[1:] for row in cells for cut in _wrap(row, WIDTH)])
    name_width = max(_LEAST_NAME_WIDTH, WIDTH - 1 - max(map(len, without_names.splitlines())))
    return _grid(columns, [cut for row in cells for cut in _wrap(row, name_width)])


def _grid(columns: Sequence[_Column], rows: Sequence[Sequence[str]]) -> str:
    text: str = tabulate(
        [
            [column.header for column in columns],
            [column.unit for column in columns],
            SEPARATING_LINE,
            *rows,
        ],
        tablefmt=_FORMAT,
        disable_numparse=True,
        colalign=[column.align for column in columns],
    )
    return "\n".join(line.rstrip() for line in text.splitlines())


def _wrap(row: list[str], name_width: int) -> list[list[str]]:
    """A row of cells as one or more, so that its module path and its operation keep to their widths."""
    name, count, op, *others = row
    pieces = zip_longest(_pieces(name, _NAME_CUTS, name_width), _pieces(op, _OP_CUTS, _OP_WIDTH), fillvalue="")
    (first_name, first_op), *more = pieces
    blank = [""] * len(others)
    return [[first_name, count, first_op, *others], *([part, "", op_part, *blank] for part, op_part in more)]


def _pieces(text: str, cuts: re.Pattern[str], width: int) -> list[str]:
    """``text`` in pieces of at most ``width``, cut at one of the places that ``cuts`` finds where there is one."""
    pieces = []
    while len(text) > width:
        cut = max((place.start() for place in cuts.finditer(text) if 0 < place.start() <= width), default=width)
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


def _render_totals(totals: Totals) -> str:
    ours = totals.predicted_step_s
    seconds: list[tuple[str, float | None]] = [("this schedule", ours), ("floor", totals.floor_s)]
    seconds += [(BASELINE_NAMES.get(name, name), value) for name, value in totals.baselines.items()]
    lines = [[name, *_compared(value, ours)] for name, value in seconds]
    table: str = tabulate(
        lines,
        headers=["predicted step", "ms", "to ours"],
        tablefmt="simple",
        disable_numparse=True,
        colalign=["left", "right", "right"],
    )
    weights = (
        f"weights of one step: {format_bytes(totals.resident_bytes)} resident, "
        f"{format_bytes(totals.streamed_bytes)} streamed, {format_bytes(totals.host_bytes)} on the host"
    )
    return f"{weights}\n\n{table}\n\n{verdict(ours, totals.baselines)}"


def _compared(seconds: float | None, ours: float) -> list[str]:
    if seconds is None:
        return ["does not fit", ""]
    return [_three_digits(1e3 * seconds) or "0", f"{seconds / ours:.2f}x" if ours > 0 else ""]
