"""Predicted tokens/s against the measurements of the HeteGen paper, and against any other series of the kind.

    python -m benchmarks.paper_figure [--series FILE.json ...] [--hardware a10-xeon] [--json OUT] [--plot OUT.svg]

A series file names a model (``config``: what its config.json would say), prompt, new tokens, batch and dtype, and holds
(GB of GPU memory, tokens/s) points by system; ``benchmarks/paper_opt_6_7b.json`` is the paper's for OPT-6.7B. Each
system is compared with the same scheme in the cost model, a baseline of every plan:

    HeteGen     per_linear   each Linear split by a ratio of its own (the paper's scheme)
    FlexGen     streamed     what is not resident is streamed with prefetch
    Accelerate  per_module   each module's weights copied from pageable memory when it is called

``this project`` is what the plan itself predicts: it balances the step as a whole, so it may be faster than the paper's
scheme; nobody has measured that on this hardware. The preset a10-xeon was fitted to the OPT-6.7B series and to nothing
else, so that for other models the comparison is a prediction.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from transformers import AutoConfig

from benchmarks.arguments import output_file
from hetegen_compile.dry_run import GenerationPlan, plan_generation

DEFAULT = Path(__file__).with_name("paper_opt_6_7b.json")
SCHEMES = {"HeteGen": "per_linear", "FlexGen": "streamed", "Accelerate": "per_module"}
OURS = "this project"
_WIDTH, _HEIGHT = 72, 20
_MARKS = "oxs^v*"


@dataclass(frozen=True)
class Point:
    """One measured point and what the cost model predicts for it; tokens/s. ``ours`` is this project's plan."""

    model: str
    system: str
    gpu_gb: float
    measured: float
    predicted: float
    ours: float

    @property
    def error(self) -> float:
        """Relative error of the prediction; positive: predicted too fast."""
        return self.predicted / self.measured - 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Compare every series, print, plot."""
    arguments = _arguments(argv)
    points: list[Point] = []
    for path in arguments.series:
        points += compare(json.loads(path.read_text()), arguments.hardware)
    print(_table(points))
    print(f"\n{_summary(points)}\n\n{text_plot(points)}")
    if arguments.json:
        arguments.json.write_text(json.dumps([{**asdict(one), "error": one.error} for one in points], indent=2) + "\n")
    if arguments.plot:
        _plot(points, arguments.plot)
    return 0


def compare(series: dict[str, Any], hardware: str) -> list[Point]:
    """Every point of a series file, each planned with its memory as the budget."""
    config = AutoConfig.for_model(**series["config"])
    found = []
    for system, measured in series["series"].items():
        for gpu_gb, tokens_per_s in measured:
            plan = _planned(series, config, gpu_gb, hardware)
            predicted = _predicted(plan, system)
            found.append(Point(series["model"], system, gpu_gb, tokens_per_s, predicted, plan.tokens_per_s))
            print(f"{series['model']} {system} {gpu_gb} GB: {predicted:.2f}", file=sys.stderr, flush=True)
    return found


def _planned(series: dict[str, Any], config: Any, gpu_gb: float, hardware: str) -> GenerationPlan:
    return plan_generation(
        config, prompt=series["prompt"], new_tokens=series["new_tokens"], batch=series["batch"], dtype=series["dtype"],
        options={"hardware": hardware, "gpu_memory": round(gpu_gb * 1e9)},
    )  # fmt: skip


def _predicted(plan: GenerationPlan, system: str) -> float:
    """Tokens/s of the system's scheme; where everything fits all schemes are the resident one."""
    scheme = SCHEMES.get(system, "per_linear")
    generation = plan.baselines.get(scheme) or plan.baselines.get("resident")
    return generation.tokens_per_s if generation is not None else plan.tokens_per_s


def _table(points: Sequence[Point]) -> str:
    rows = [
        (p.model, p.system, p.gpu_gb, p.measured, f"{p.predicted:.2f}", f"{p.error:+.1%}", f"{p.ours:.2f}")
        for p in points
    ]
    headers = ["model", "system", "GPU GB", "measured tokens/s", "predicted", "error", OURS]
    return str(tabulate(rows, headers=headers))


def _summary(points: Sequence[Point]) -> str:
    lines = []
    for model, system in dict.fromkeys((one.model, one.system) for one in points):
        errors = [abs(one.error) for one in points if (one.model, one.system) == (model, system)]
        lines.append(f"{model}, {system}: mean error {statistics.mean(errors):.1%}, largest {max(errors):.1%}")
    return "\n".join(lines)


def text_plot(points: Sequence[Point]) -> str:
    """Tokens/s over GPU memory as characters: measured marks, and ``.`` where the prediction is (``#`` for both)."""
    right, top = max(one.gpu_gb for one in points), max(max(one.measured, one.predicted) for one in points)
    canvas = [[" "] * (_WIDTH + 1) for _ in range(_HEIGHT + 1)]

    def place(gpu_gb: float, rate: float, mark: str) -> None:
        row, column = _HEIGHT - round(rate / top * _HEIGHT), round(gpu_gb / right * _WIDTH)
        canvas[row][column] = mark if canvas[row][column] == " " else "#"

    systems = list(dict.fromkeys((one.model, one.system) for one in points))
    for one in points:
        place(one.gpu_gb, one.predicted, ".")
        place(one.gpu_gb, one.measured, _MARKS[systems.index((one.model, one.system)) % len(_MARKS)])
    lines = [f"{top * (_HEIGHT - i) / _HEIGHT:6.1f} |{''.join(row).rstrip()}" for i, row in enumerate(canvas)]
    legend = ", ".join(f"{_MARKS[i % len(_MARKS)]} {model} {system}" for i, (model, system) in enumerate(systems))
    axis = f"       +{'-' * _WIDTH}\n        0{'GB of GPU memory':^{_WIDTH - 6}}{right:g}"
    return "\n".join(["tokens/s", *lines, axis, f"measured: {legend}; . predicted, # both"])


def _plot(points: Sequence[Point], path: Path) -> None:
    try:
        import matplotlib.pyplot as plt  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib (the text plot needs nothing)") from None
    figure, axes = plt.subplots()
    for model, system in dict.fromkeys((one.model, one.system) for one in points):
        own = sorted((one for one in points if (one.model, one.system) == (model, system)), key=lambda one: one.gpu_gb)
        x = [one.gpu_gb for one in own]
        (line,) = axes.plot(x, [one.predicted for one in own], label=f"{model} {system}, predicted")
        axes.plot(x, [one.measured for one in own], "o", color=line.get_color(), label=f"{model} {system}, measured")
    axes.set_xlabel("GB of GPU memory")
    axes.set_ylabel("tokens/s")
    axes.legend()
    figure.savefig(path)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper_figure", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--series", type=Path, nargs="+", default=[DEFAULT], help="series files (default: the paper's)")
    parser.add_argument("--hardware", default="a10-xeon", help="a preset or the path of a profile")
    parser.add_argument("--json", type=output_file, metavar="OUT", help="write all points to this file")
    parser.add_argument("--plot", type=output_file, metavar="OUT", help="write a plot (needs matplotlib)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
