"""``python -m benchmarks.compare``: one child for each way and memory limit, a table for each limit, one JSON."""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import benchmarks.compare as compare
from benchmarks.children import run_child, write_json
from benchmarks.compare.job import HETEGEN, Job, Row
from benchmarks.compare.report import at_limit, best_peer, tables
from benchmarks.compare.ways import EMULATED, LIMITED, WAYS
from benchmarks.random_models import DTYPES, SHAPES, weight_bytes_of
from hetegen_compile.bench.timing import CACHES
from hetegen_compile.calibration import this_machine
from hetegen_compile.options import format_bytes, parse_bytes


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the tables; 1 if hetegen has no figure at some limit."""
    arguments = parse_arguments(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)  # for the hardware line; the children set their own
    jobs = list(jobs_of(arguments))
    rows: list[Row] = []
    results = heading(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if arguments.json is None else arguments.json.with_suffix(".jobs")
        folder.mkdir(exist_ok=True, parents=True)  # beside the result, rows of a job that was cut off stay
        for number, job in enumerate(jobs):
            rows += run(job, arguments.limit, folder / str(number))
            print(f"{job.name}: {rows[-1].note or 'measured'}", file=sys.stderr, flush=True)
            results["rows"] = [row.to_json() for row in rows]
            if arguments.json:
                write_json(arguments.json, results)
    print(f"{results['hardware']}\n{results['what']}\n\n{tables(rows)}")
    for limit in arguments.gpu_memory:
        best = best_peer(at_limit(rows, limit))
        if best is not None:
            print(f"{format_bytes(limit)}: {best[1]:.2f} times the best peer ({best[0]})")
    measured = [row for row in rows if row.way == HETEGEN and row.decode_tokens_per_s]
    return int(len(measured) < len(arguments.gpu_memory))


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    """The children: ways that differ with the limit once for each, the others once; hetegen first."""
    emulated = arguments.accelerator == "emulated"
    ways = [way for way in WAYS if way in arguments.ways and not (emulated and way != HETEGEN)]
    plain = vars(arguments)
    common = {
        name: plain[name] for name in ("shape", "dtype", "prompt", "new_tokens", "threads", "accelerator", "cache")
    }
    common |= {"hardware": arguments.hardware, "step_s": arguments.step_s}
    jobs = []
    for way in ways:
        for number, limit in enumerate(arguments.gpu_memory if way in LIMITED else [None]):
            traced = arguments.trace if way == HETEGEN and number == 0 else None
            job = Job(way, gpu_memory=limit, trace=traced and str(traced), **common)
            fewer = way != HETEGEN and arguments.peer_tokens
            jobs.append(replace(job, new_tokens=arguments.peer_tokens) if fewer else job)
    return jobs


def run(job: Job, limit_s: float, files: Path) -> list[Row]:
    """A child's rows; one that says why, if it did not come to its end."""
    outcome = run_child("benchmarks.compare.child", asdict(job), limit_s=limit_s, files=files)
    rows = [Row(**row) for row in outcome.notes.get("rows", [])]
    if outcome.ok:
        return rows
    print(f"{job.name}: {outcome.reason}", file=sys.stderr, flush=True)
    why = outcome.notes.get("error") or outcome.reason.partition("\n")[0]
    return [*rows, Row(job.way, job.gpu_memory, note=f"{outcome.status}: {why}")]


def heading(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was compared, and where."""
    cuda = arguments.accelerator == "cuda"
    nbytes = weight_bytes_of(arguments.shape, DTYPES[arguments.dtype])
    hardware = str(this_machine(cuda=cuda))
    if not cuda:
        hardware = (
            f"emulated accelerator, paced to {arguments.hardware}, on {hardware}: ratios between hetegen's splits mean "
            "something, speeds do not"
        )
    return {
        "hardware": hardware,
        "what": (
            f"{arguments.shape}, {arguments.dtype}, {format_bytes(nbytes)} of random weights, batch 1, greedy, "
            f"prompt {arguments.prompt}, {arguments.new_tokens} new tokens, {arguments.cache} cache (peers: dynamic)"
        ),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": str(datetime.date.today()),
        "not_emulated": [] if cuda else [way for way in WAYS if way != HETEGEN and way not in EMULATED],
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Of the command line; limits become bytes, defaults what suits the accelerator."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=compare.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add: Callable[..., Any] = parser.add_argument
    add("--model", dest="shape", default="opt-tiny", choices=SHAPES, help="shape (default: %(default)s)")
    add("--dtype", default="bfloat16", choices=DTYPES, help="of the weights (default: %(default)s)")
    add("--gpu-memory", nargs="+", type=_budget, default=[0.3, 0.6], metavar="LIMIT",
        help='"4GiB", or a share of the weights such as 0.3 (default: 0.3 0.6)')  # fmt: skip
    add("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="default: all; emulated: hetegen's own")
    add("--prompt", type=int, default=32, help="tokens (default: %(default)s)")
    add("--new-tokens", type=int, default=16, help="tokens (default: %(default)s)")
    add(
        "--peer-tokens",
        type=int,
        help="new tokens of ways that are not hetegen's, which may be slow (default: as many)",
    )
    cache = "of keys and values under hetegen and Inductor, peers have the dynamic one (default: %(default)s)"
    add("--cache", default="static", choices=CACHES, help=cache)
    add("--accelerator", default="auto", choices=["auto", "cuda", "emulated"])
    add("--hardware", default=None, help="profile; default: calibrated on CUDA, a10-xeon where emulated")
    add("--step-s", type=float, default=0.5, help="emulated: seconds of a paced decode step (default: %(default)s)")
    add("--threads", type=int, help="of torch on the host")
    add("--limit", type=float, default=600.0, help="seconds for each child (default: %(default)s)")
    add("--trace", type=Path, help="file for the trace of a decode step at the first limit")
    add("--json", type=Path, metavar="OUT", help="write all rows to this file, after each child")
    arguments = parser.parse_args(argv)
    if arguments.accelerator == "auto":
        arguments.accelerator = "cuda" if torch.cuda.is_available() else "emulated"
    arguments.hardware = arguments.hardware or ("auto" if arguments.accelerator == "cuda" else "a10-xeon")
    weights = weight_bytes_of(arguments.shape, DTYPES[arguments.dtype])
    arguments.gpu_memory = [
        int(limit * weights) if isinstance(limit, float) else limit for limit in arguments.gpu_memory
    ]
    return arguments


def _budget(text: str) -> int | float:
    """Bytes, or a share of the weights."""
    try:
        share = float(text)
    except ValueError:
        return parse_bytes(text)
    return share if share <= 1 else int(share)


if __name__ == "__main__":
    sys.exit(main())
