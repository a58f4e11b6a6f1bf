"""Host kernels against the rate at which the same threads read main memory, by dtype, tokens and shape.

    python -m benchmarks.host_linear --threads 1 --json host_linear.json

A kernel reads each weight once, so the read rate of memory bounds it. Read rate: the fastest of torch's reductions and
dot products over more memory than the caches hold, measured again beside each row of the table (machines are shared;
a ratio compares figures of the same second). Weights rotate over more memory than the caches hold, too. Kernels marked
"copy" need a second copy of the weights, which hetegen never makes: they show what that leaves unused.

``--cut 0.7`` computes with the first 70 % of each weight's columns (in steps of 64, as plans cut them), as the last
Linear of a block does on the host: its rows have gaps between them, at each of which hardware prefetchers begin anew.
Shares and rates are of what is read.

Where other work runs on the machine, ``--threads 1 --cpu-time`` takes times from the thread's processor time, which
leaves out that it had to wait for a processor (not that it shares caches and memory).
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.arguments import output_file, whole_number
from hetegen_compile.calibration import Effort, this_machine
from hetegen_compile.calibration.host import rotation_bytes
from hetegen_compile.calibration.kernels import (
    Compute,
    CopyingKernel,
    call_durations_s,
    copying_kernels,
    cut_weights,
    in_place,
    make_arena,
)
from hetegen_compile.calibration.linears import usable_kernels
from hetegen_compile.calibration.timing import durations_s, plain_torch
from hetegen_compile.cost_model import row_granularity
from hetegen_compile.geometry import dtype_name

DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8)}
SHAPES = "4096x4096,11008x4096,4096x11008,5120x5120"
TOKENS = "1,2,4,8,16"

T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """One kernel at one point.

    Attributes:
        dtype, tokens, rows, columns: what was computed; the weight is rows x columns.
        read_columns: how many of the columns were computed with.
        kernel: its name.
        copies: whether it needs a second copy of the weight.
        bytes_per_s: of weights, median over rounds of each round's median.
        read_share: over the rounds, the median of that rate over the read rate measured beside it.
        read_share_low, read_share_high: the lowest and the highest round.
    """

    dtype: str
    tokens: int
    rows: int
    columns: int
    read_columns: int
    kernel: str
    copies: bool
    bytes_per_s: float
    read_share: float
    read_share_low: float
    read_share_high: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    effort = Effort(budget_s=arguments.budget, clock=clock)
    with plain_torch():
        reader = fastest_reader(effort)
        figures = [figure for dtype in arguments.dtypes for figure in measure(dtype, reader, arguments, effort)]
    kind = "processor time" if arguments.cpu_time else "wall time"
    cut = f"{arguments.cut:.0%} of the columns; " if arguments.cut < 1.0 else ""
    hardware = f"{cut}{this_machine(cuda=False)}; {arguments.rounds} rounds, {kind}; {datetime.date.today()}"
    read = f"read rate of memory: {reader.bytes_per_s / 1e9:.1f} GB/s ({reader.name})"
    print(f"{table(figures)}\n\n{summary(figures)}\n{read}\n{hardware}")
    if arguments.json:
        source = {"name": reader.name, "bytes_per_s": reader.bytes_per_s}
        data = {"hardware": hardware, "read": source, "figures": [asdict(figure) for figure in figures]}
        arguments.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


# ---- the rate of reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A pure read of memory, and its rate when it was chosen."""

    name: str
    bytes_per_s: float
    read: Callable[[int], object]
    nbytes: int


def fastest_reader(effort: Effort) -> Reader:
    """The fastest of torch's ways to read every byte once; reads go through the buffer in pieces of 32 MiB."""
    pieces = torch.ones(max(rotation_bytes(effort), 256 << 20) // 4).split(8 << 20)
    ways: Mapping[str, Callable[[Tensor], object]] = {
        "sum": torch.sum,
        "dot of halves": lambda piece: torch.dot(piece[: piece.numel() // 2], piece[piece.numel() // 2 :]),
        "norm": torch.linalg.vector_norm,
        "sum of int64": lambda piece: piece.view(torch.int64).sum(),
    }
    readers = []
    for name, way in ways.items():
        read = partial(_read_piece, way, pieces)
        readers.append(Reader(name, read_rate(read, pieces[0].nbytes, effort), read, pieces[0].nbytes))
    return max(readers, key=lambda reader: reader.bytes_per_s)


def _read_piece(way: Callable[[Tensor], object], pieces: Sequence[Tensor], index: int) -> object:
    return way(pieces[index % len(pieces)])


def read_rate(read: Callable[[int], object], nbytes: int, effort: Effort) -> float:
    """Median bytes per second of a read of ``nbytes``."""
    return nbytes / statistics.median(durations_s(read, effort))


# ---- the kernels -----------------------------------------------------------------------------------------------


def measure(dtype: str, reader: Reader, arguments: argparse.Namespace, effort: Effort) -> Iterator[Figure]:
    """All kernels of a dtype at all shapes and numbers of tokens."""
    largest = max(rows * columns for rows, columns in arguments.shapes) * DTYPES[dtype].itemsize
    arena = make_arena(DTYPES[dtype], max(rotation_bytes(effort), largest))
    for rows, columns in arguments.shapes:
        whole = cut_weights(arena, rows * columns * arena.itemsize, (columns,))
        used = columns if arguments.cut == 1.0 else _whole_steps(columns * arguments.cut, columns)
        weights = [weight[:, :used] for weight in whole]
        for tokens in arguments.tokens:
            for name, copies, compute, forms in _candidates(weights, tokens):
                rounds = [_round(compute, weights, forms, tokens, reader, effort) for _ in range(arguments.rounds)]
                shares = [rate / read for rate, read in rounds]
                yield Figure(
                    dtype, tokens, rows, columns, used, name, copies,
                    statistics.median(rate for rate, _ in rounds),
                    statistics.median(shares), min(shares), max(shares),
                )  # fmt: skip


def _whole_steps(most: float, columns: int) -> int:
    step = row_granularity(columns)
    return max(step, int(most) // step * step)


def _candidates(weights: Sequence[Tensor], tokens: int) -> Iterator[tuple[str, bool, Compute, Sequence[Tensor] | None]]:
    """(name, needs a copy, compute, what to compute with) of each kernel that this machine can run."""
    for kernel in usable_kernels(weights[0].dtype):
        reason = kernel.refusal(weights[0])
        if reason is None:
            yield kernel.name, False, in_place(kernel), None
        else:
            print(f"{kernel.name}: not for these weights: {reason}", file=sys.stderr)
    if not weights[0].is_contiguous():
        return  # a copy has no gaps, whatever it is made of
    for copying in copying_kernels(weights[0].dtype):
        forms = _prepared(copying, weights, tokens)
        if forms is not None:
            yield copying.name, True, copying.run, forms


def _prepared(kernel: CopyingKernel, weights: Sequence[Tensor], tokens: int) -> list[Tensor] | None:
    """The kernel's copies of the weights; None, with a line, if it cannot compute them here."""
    try:
        forms = [kernel.prepare(weight, tokens) for weight in weights]
        kernel.run(torch.zeros((tokens, weights[0].shape[1]), dtype=weights[0].dtype), forms[0])
    except RuntimeError as error:
        print(f"{kernel.name}: not for {weights[0].dtype} here: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return None
    return forms


def _round(
    compute: Compute,
    weights: Sequence[Tensor],
    forms: Sequence[Tensor] | None,
    tokens: int,
    reader: Reader,
    effort: Effort,
) -> tuple[float, float]:
    """(the kernel's rate, the read rate) of one round."""
    calls, read_rate = beside_reads(lambda: call_durations_s(compute, weights, tokens, effort, forms), reader, effort)
    return statistics.median(nbytes / seconds for nbytes, seconds in calls), read_rate


def beside_reads(measure: Callable[[], T], reader: Reader, effort: Effort) -> tuple[T, float]:
    """(what was measured, the read rate) of one round: the measurement between two halves of the reads."""
    half = replace(effort, budget_s=effort.budget_s / 2)
    before = durations_s(reader.read, half)
    measured = measure()
    after = durations_s(reader.read, half)
    return measured, reader.nbytes / statistics.median(before + after)


# ---- output ----------------------------------------------------------------------------------------------------


def table(figures: Sequence[Figure]) -> str:
    """Rows by dtype, shape and kernel; a column for each number of tokens: GB/s and the share of the read rate."""
    tokens = sorted({figure.tokens for figure in figures})
    keys = dict.fromkeys((f.dtype, f"{f.rows} x {f.columns}", f.kernel + " (copy)" * f.copies) for f in figures)
    cells = {
        (f.dtype, f"{f.rows} x {f.columns}", f.kernel + " (copy)" * f.copies, f.tokens): (
            f"{f.bytes_per_s / 1e9:.1f} ({f.read_share:.0%})"
        )
        for f in figures
    }
    rows = [(*key, *(cells.get((*key, count), "") for count in tokens)) for key in keys]
    headers = ["dtype", "weight", "kernel", *(f"{count} token{'s' * (count > 1)}, GB/s (of read)" for count in tokens)]
    return str(tabulate(rows, headers=headers, disable_numparse=True))


def summary(figures: Sequence[Figure]) -> str:
    """Per dtype, at one token: the best kernel without a copy at its worst shape."""
    lines = []
    for dtype in dict.fromkeys(figure.dtype for figure in figures):
        best: dict[tuple[int, int], Figure] = {}
        for figure in figures:
            place = (figure.rows, figure.columns)
            if (figure.dtype, figure.tokens, figure.copies) != (dtype, 1, False):
                continue
            if place not in best or figure.read_share > best[place].read_share:
                best[place] = figure
        if best:
            worst = min(best.values(), key=lambda figure: figure.read_share)
            lines.append(
                f"{dtype}, 1 token: at least {worst.read_share:.0%} of the read rate "
                f"({worst.kernel}, {worst.rows} x {worst.columns})"
            )
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_linear", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--dtypes", type=_dtypes, default=list(DTYPES), help="comma-separated, default all")
    parser.add_argument("--shapes", type=_shapes, default=_shapes(SHAPES), help=f"out x in, default {SHAPES}")
    parser.add_argument("--cut", type=_share, default=1.0, metavar="SHARE", help="of the columns, default all")
    parser.add_argument("--tokens", type=_numbers, default=_numbers(TOKENS), help=f"default {TOKENS}")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each figure")
    parser.add_argument("--budget", type=float, default=0.1, help="seconds for each measurement")
    parser.add_argument("--json", type=output_file, metavar="OUT", help="write all figures to this file")
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of wall time")
    arguments = parser.parse_args(argv)
    if arguments.cpu_time and arguments.threads != 1:
        parser.error("--cpu-time sees one thread only: add --threads 1")
    return arguments


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"'{name}': valid are {', '.join(DTYPES)}")
    return names


def _numbers(text: str) -> list[int]:
    return [whole_number(number) for number in text.split(",")]


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise argparse.ArgumentTypeError(f"'{text}': valid are shares above 0 up to 1")
    return share


def _shapes(text: str) -> list[tuple[int, int]]:
    return [_shape(shape) for shape in text.split(",")]


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*([1-9][0-9]*)x([1-9][0-9]*)\s*", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}': valid are rows x columns such as 4096x11008, separated by commas")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
