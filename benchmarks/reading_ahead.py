"""What the host gains by reading weights ahead while it waits for activations.

    python -m benchmarks.reading_ahead --threads 2 --json reading_ahead.json

Between two trips of a decode step the accelerator works alone for some hundred microseconds. Here an event that is over
after so long stands for it: no accelerator takes part, the wait is the only thing that is made up. Each trip waits,
computes a Linear of one token with weights that are in no cache, and is timed from the end of its wait. By turns
nothing is read ahead, and what ``--ahead-mib`` says (default: what calibration finds here).
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from tabulate import tabulate

from benchmarks.arguments import output_file, whole_number
from hetegen_compile.calibration import Effort, this_machine
from hetegen_compile.calibration.host import rotation_bytes
from hetegen_compile.calibration.kernels import cut_weights, make_arena
from hetegen_compile.calibration.reading_ahead import linear_call, measure_ahead
from hetegen_compile.calibration.timing import plain_torch
from hetegen_compile.host_kernels import KERNELS
from hetegen_compile.host_kernels.program import Call, Wait

KERNELS_OF_OURS = [name for name, kernel in KERNELS.items() if kernel.reading is not None]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Later:
    """An event that is over at a time; the calling thread waits for it without sleeping."""

    def __init__(self) -> None:
        self.over_s = 0.0
        function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
        self._functions = function(self._wait), function(self._pending)
        wait, pending = (ctypes.cast(one, ctypes.c_void_p).value for one in self._functions)
        self.wait = Wait(wait, pending, 1)

    def _pending(self, _: int | None) -> int:
        return int(time.perf_counter() < self.over_s)

    def _wait(self, _: int | None) -> int:
        while time.perf_counter() < self.over_s:
            pass
        return 0


@dataclass(frozen=True)
class Figure:
    """Medians of a gap: from the end of the wait to the result without and with reading ahead, and what was read."""

    gap_s: float
    without_s: float
    with_s: float
    read_bytes: float

    @property
    def saved_of_gap(self) -> float:
        """The share of the gap that the Linear is over sooner."""
        return (self.without_s - self.with_s) / self.gap_s


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    effort = Effort()
    dtype, kernel = DTYPES[arguments.dtype], KERNELS[arguments.kernel]
    with plain_torch():
        arena = make_arena(dtype, rotation_bytes(effort))
        weights = cut_weights(arena, arguments.weight_mib << 20, (4096,))
        if not weights:
            room = f"weights rotate over {arena.nbytes >> 20} MiB on this machine"
            print(f"--weight-mib {arguments.weight_mib}: {room}", file=sys.stderr)
            return 2
        if arguments.ahead_mib is None:
            ahead_bytes = measure_ahead(arena, kernel, effort, None, None).nbytes
        else:
            ahead_bytes = arguments.ahead_mib << 20
        calls = [[linear_call(weight, kernel, size) for weight in weights] for size in (0, ahead_bytes)]
        figures = [_figure(calls, gap_us * 1e-6, arguments.calls) for gap_us in arguments.gaps_us]
    hardware = f"{this_machine(cuda=False)}, {arguments.threads} thread(s) used; {datetime.date.today()}"
    print(
        f"{table(figures)}\n\nat most {ahead_bytes >> 20} MiB ahead; {arguments.dtype}, {arguments.kernel}\n{hardware}"
    )
    if arguments.json:
        data = {"hardware": hardware, "ahead_bytes": ahead_bytes, "figures": [asdict(figure) for figure in figures]}
        arguments.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


def _figure(calls: Sequence[Sequence[Call]], gap_s: float, count: int) -> Figure:
    later, turn = Later(), 0
    seconds: list[list[float]] = [[] for _ in calls]
    read = []
    for _ in range(count):
        for own, found in zip(calls, seconds, strict=True):
            call, turn = own[turn % len(own)], turn + 1
            later.over_s = time.perf_counter() + gap_s
            call.trip(later.wait, 1)
            found.append(time.perf_counter() - later.over_s)
        read.append(call.read_bytes)
    without_s, with_s = map(statistics.median, seconds)
    return Figure(gap_s, without_s, with_s, statistics.median(read))


def table(figures: Sequence[Figure]) -> str:
    """A row for each gap."""
    rows = [
        (
            f"{one.gap_s * 1e6:.0f}",
            f"{one.read_bytes / 2**20:.1f}",
            f"{one.without_s * 1e6:.0f}",
            f"{one.with_s * 1e6:.0f}",
            f"{one.saved_of_gap:.0%}",
        )
        for one in figures
    ]
    headers = ["gap us", "read ahead MiB", "without us", "with us", "saved, of the gap"]
    return str(tabulate(rows, headers=headers, disable_numparse=True))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reading_ahead", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    number = whole_number
    parser.add_argument("--threads", type=number, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the weights")
    parser.add_argument("--kernel", choices=KERNELS_OF_OURS, default=KERNELS_OF_OURS[-1], help="of the Linear")
    parser.add_argument("--gaps-us", nargs="+", type=number, default=[100, 200, 400, 800], help="microseconds to wait")
    parser.add_argument("--weight-mib", type=number, default=64, help="of each weight [out, 4096]")
    parser.add_argument("--ahead-mib", type=number, help="to read ahead at most")
    parser.add_argument("--calls", type=number, default=60, help="of each kind for each gap")
    parser.add_argument("--json", type=output_file, metavar="OUT", help="write all figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
