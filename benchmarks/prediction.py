"""Predicted against measured decode steps on the emulated accelerator, its lanes paced to hardware profiles.

    python -m benchmarks.prediction [--hardware NAME ...] [--cache dynamic static] [--seconds 1.0] [--json OUT]

A random-weight Llama decodes under a budget of part of its weights. The pace is chosen so that a step takes at least
``--seconds``: the lanes then sleep most of the time and this machine's own speed hardly matters. The prediction is
that of the schedule that ran, times the pace. It says whether the simulated timeline and the asynchronous runtime
agree, with real waits, slots and prefetches; it says nothing about the speed of the named hardware.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
import transformers
from tabulate import tabulate

import hetegen_compile
from benchmarks.arguments import output_file
from hetegen_compile.bench.measure import Split, compile_anew, decode_schedule
from hetegen_compile.bench.timing import CACHES, Cache, generate_timed
from hetegen_compile.bench.weights import parameter_bytes
from hetegen_compile.calibration import this_machine

HARDWARE = ("rtx3060-laptop", "rtx4090-desktop", "a10-xeon")
BUDGETS = (0.3, 0.6)
SPLITS: tuple[Split, ...] = ("auto", 0.0)
_SIZES: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
}  # fmt: skip
_WARM_UP = 3  # the first step compiles, the second carries nothing yet, the third is traced


@dataclass(frozen=True)
class Result:
    """One plan. Seconds are those of the profile: measured ones are divided by the pace."""

    hardware: str
    cache: Cache
    budget_share: float
    split: str
    pace: float
    predicted_s: float
    measured_s: float
    lowest_run_s: float
    highest_run_s: float
    streamed_bytes: int
    host_bytes: int

    @property
    def error(self) -> float:
        """Relative error of the prediction; positive: predicted too slow."""
        return self.predicted_s / self.measured_s - 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every combination, print; 1 if a prediction is off by more than the tolerance."""
    arguments = _arguments(argv)
    torch.set_num_threads(1)
    settings = product(arguments.hardware, arguments.cache, BUDGETS)
    results = [result for setting in settings for result in measure(*setting, arguments)]
    largest = max(abs(result.error) for result in results)
    machine = f"emulated accelerator on {this_machine(cuda=False)}; lanes paced, only ratios mean anything"
    print(f"{_table(results)}\n\n{machine}\nlargest error {largest:.1%}")
    if arguments.json:
        data = {"hardware": machine, "results": [{**asdict(one), "error": one.error} for one in results]}
        arguments.json.write_text(json.dumps(data, indent=2) + "\n")
    return int(largest > arguments.tolerance)


def measure(hardware: str, cache: Cache, budget_share: float, arguments: argparse.Namespace) -> Iterator[Result]:
    """One compilation at a pace that suits the profile, each split run several times."""
    model = _model()
    weights = parameter_bytes(model)
    options = {
        "accelerator": "emulated", "hardware": hardware, "gpu_memory": int(budget_share * weights),
        "context": 64, "print_schedule": False,
    }  # fmt: skip
    compile_anew(model, options)
    _decode(model, 3, cache)
    pace = arguments.seconds / decode_schedule("auto").predicted_step_s
    compile_anew(model, {**options, "pace": pace})
    for split in SPLITS:
        with hetegen_compile.override_split(split):
            runs = [_run(model, split, arguments.steps, cache) for _ in range(arguments.runs)]
        schedule = decode_schedule(split)
        medians = [statistics.median(run) / pace for run in runs]
        yield Result(
            hardware, cache, budget_share, str(split), pace, schedule.predicted_step_s, statistics.median(medians),
            min(medians), max(medians), schedule.streamed_bytes, schedule.host_bytes,
        )  # fmt: skip


def _model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_SIZES, vocab_size=2048, max_position_embeddings=64, eos_token_id=None)
    return transformers.LlamaForCausalLM(config).eval()


def _run(model: Any, split: Split, steps: int, cache: Cache) -> list[float]:
    """Wall-clock seconds of the steps after the warm-up."""
    known = {id(s): len(s.step_times_s) for s in hetegen_compile.schedules()}
    _decode(model, steps + _WARM_UP, cache)
    schedule = decode_schedule(split)
    return schedule.step_times_s[known.get(id(schedule), 0) + _WARM_UP - 1 :]


def _decode(model: Any, tokens: int, cache: Cache) -> None:
    generate_timed(model, torch.arange(4, 8).unsqueeze(0), tokens, cache)


def _table(results: Sequence[Result]) -> str:
    rows = [
        (
            one.hardware, one.cache, f"{one.budget_share:.0%}", one.split, f"{one.pace:.0f}",
            f"{one.predicted_s * 1e3:.3f}", f"{one.measured_s * 1e3:.3f}",
            f"{one.lowest_run_s * 1e3:.3f}..{one.highest_run_s * 1e3:.3f}", f"{one.error:+.1%}",
        )
        for one in results
    ]  # fmt: skip
    headers = ["profile", "cache", "budget", "split", "pace", "predicted ms", "measured ms / pace", "runs", "error"]
    return str(tabulate(rows, headers=headers, disable_numparse=True))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--hardware", nargs="+", default=list(HARDWARE), help="presets or paths of profiles")
    parser.add_argument("--cache", nargs="+", default=list(CACHES), choices=CACHES, help="default: both")
    parser.add_argument("--seconds", type=float, default=1.0, help="wall-clock seconds of a step, at least")
    parser.add_argument("--runs", type=int, default=3, help="runs of each plan; the table shows their spread")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a run")
    parser.add_argument("--tolerance", type=float, default=0.2, help="largest error that is no failure")
    parser.add_argument("--json", type=output_file, metavar="OUT", help="write all figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
