"""How well a calibrated profile predicts host Linears of shapes that calibration did not measure.

    python -m benchmarks.calibration --threads 1 --json calibration.json

Calibrates the host, then measures fresh and compares with ``host_linear_s``. Nothing else should run on the
machine: the machine's own variation is part of the error, and the table shows it beside the error (spread).
Where something else does run, ``--threads 1 --cpu-time`` takes both from the thread's processor time, which
leaves out that it had to wait for a processor (not that it shares caches and memory).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks.arguments import output_file
from hetegen_compile.calibration import Effort, calibrate, this_machine
from hetegen_compile.calibration.host import rotation_bytes
from hetegen_compile.calibration.kernels import Compute, cut_weights, kernel_rate, make_arena
from hetegen_compile.calibration.timing import plain_torch
from hetegen_compile.cost_model import HardwareProfile, host_linear_s
from hetegen_compile.geometry import dtype_name
from hetegen_compile.host_kernels import bind_kernels

SHAPES = ((11008, 4096), (5120, 5120), (3072, 768), (1024, 8192), (640, 3584))
"""Weights (out, in); the last is the size of a split Linear's part."""

TOKENS = (1, 3, 6, 24, 100)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Comparison:
    """One shape at one number of tokens.

    Attributes:
        dtype, tokens, rows, columns: what was computed; the weight is rows x columns.
        measured_s: median over the runs of each run's median.
        spread: largest minus smallest run, over the median.
        predicted_s: what the profile says.
    """

    dtype: str
    tokens: int
    rows: int
    columns: int
    measured_s: float
    spread: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Relative error of the prediction; positive: the prediction is too slow."""
        return self.predicted_s / self.measured_s - 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate, compare, print."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    started_s = time.perf_counter()
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    profile = calibrate(accelerator="emulated", effort=Effort(clock=clock))
    calibration_s = time.perf_counter() - started_s
    effort = Effort(budget_s=arguments.budget, clock=clock)
    with plain_torch():
        comparisons = list(compare(profile, effort, arguments.runs))
    kind = "processor time" if arguments.cpu_time else "wall time"
    hardware = f"{this_machine(cuda=False)}, {len(comparisons)} Linears, {arguments.runs} runs, {kind}"
    print(_table(comparisons))
    print(f"\n{hardware}; calibrated in {calibration_s:.0f} s\n{_summary_text(comparisons)}")
    if arguments.json:
        _write(arguments.json, hardware, calibration_s, comparisons)
    return 0


def compare(profile: HardwareProfile, effort: Effort, runs: int) -> Iterable[Comparison]:
    """Measure every dtype, shape and number of tokens anew, ``runs`` times each."""
    for dtype in DTYPES:
        largest = max(rows * columns for rows, columns in SHAPES) * dtype.itemsize
        arena = make_arena(dtype, max(rotation_bytes(effort), largest))
        for shape in SHAPES:
            weights = cut_weights(arena, shape[0] * shape[1] * dtype.itemsize, (shape[1],))
            compute = runtime_linear(profile, weights[0])
            rates = [[kernel_rate(compute, weights, tokens, effort) for tokens in TOKENS] for _ in range(runs)]
            for tokens, each in zip(TOKENS, zip(*rates, strict=True), strict=True):
                yield _comparison(profile, dtype, shape, tokens, each)


def runtime_linear(profile: HardwareProfile, weight: torch.Tensor) -> Compute:
    """What the runtime computes with for such a weight: the profile's kernels, by the number of tokens."""
    linear = bind_kernels(profile.host.linear_kernels, weight, 0, weight.shape[0], 0)
    return lambda x, rows: linear(x, rows, None)


def _comparison(
    profile: HardwareProfile,
    dtype: torch.dtype,
    shape: tuple[int, int],
    tokens: int,
    rates: Sequence[float],
) -> Comparison:
    rows, columns = shape
    nbytes = rows * columns * dtype.itemsize
    flops = 2.0 * tokens * rows * columns
    predicted_s = host_linear_s(profile, dtype_name(dtype), tokens, nbytes, flops, contended=False)
    seconds = [nbytes / rate for rate in rates]
    measured_s = statistics.median(seconds)
    spread = (max(seconds) - min(seconds)) / measured_s
    return Comparison(dtype_name(dtype), tokens, rows, columns, measured_s, spread, predicted_s)


def _summary(comparisons: Sequence[Comparison]) -> dict[str, float]:
    errors = [abs(one.error) for one in comparisons]
    return {
        "median_error": statistics.median(errors),
        "within_20_percent": sum(error <= 0.2 for error in errors) / len(errors),
        "within_30_percent": sum(error <= 0.3 for error in errors) / len(errors),
        "largest_error": max(errors),
        "median_spread": statistics.median(one.spread for one in comparisons),
    }


def _summary_text(comparisons: Sequence[Comparison]) -> str:
    lines = []
    for tokens in (None, *TOKENS):
        chosen = [one for one in comparisons if tokens in (None, one.tokens)]
        values = "  ".join(f"{name} {value:.0%}" for name, value in _summary(chosen).items())
        lines.append(f"{'all' if tokens is None else f'{tokens} token(s)'}: {values}")
    return "\n".join(lines)


def _table(comparisons: Sequence[Comparison]) -> str:
    rows = [
        (
            one.dtype,
            one.tokens,
            f"{one.rows} x {one.columns}",
            f"{one.measured_s * 1e3:.3g}",
            f"{one.spread:.0%}",
            f"{one.predicted_s * 1e3:.3g}",
            f"{one.error:+.0%}",
        )
        for one in comparisons
    ]
    headers = ["dtype", "tokens", "weight", "measured ms", "spread", "predicted ms", "error"]
    return str(tabulate(rows, headers=headers, colalign=("left", *["right"] * 6)))


def _write(path: Path, hardware: str, calibration_s: float, comparisons: Sequence[Comparison]) -> None:
    data = {
        "hardware": hardware,
        "calibration_s": calibration_s,
        "summary": _summary(comparisons),
        "comparisons": [{**asdict(one), "error": one.error} for one in comparisons],
    }
    path.write_text(json.dumps(data, indent=2) + "\n")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--runs", type=int, default=3, help="fresh measurements of each Linear")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds for each measurement")
    parser.add_argument("--json", type=output_file, metavar="OUT", help="write all figures to this file")
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of wall time")
    arguments = parser.parse_args(argv)
    if arguments.cpu_time and arguments.threads != 1:
        parser.error("--cpu-time sees one thread only: add --threads 1")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
