"""``python -m benchmarks.cycles``: cycles one after the other, a table, what reproduces each failure."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from tabulate import tabulate

import benchmarks.cycles as cycles
from benchmarks.architectures import architectures
from benchmarks.arguments import output_file
from benchmarks.children import Outcome, run_child, write_json
from benchmarks.one_architecture import FACTORIES

KINDS = {"causal": 6, "seq2seq": 3, "masked": 1, "speech": 1, "vision": 1}
"""How often each is chosen where no architecture is given."""
_FIRST = ("speech", "seq2seq", "causal", "masked", "vision")
"""What a given architecture is taken as: the first of these that there is."""
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
_FAILED = ("FAILED", "failed", "timeout")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cycles; 1 if one fails."""
    options = parse_arguments(argv)
    reports = []
    for seed in range(options.seed, options.seed + options.cycles):
        name, kind = _chosen(seed, options.architecture, options.kind)
        report = _run(seed, name, kind, options.keep, options.limit)
        if options.minimise and report["status"] in _FAILED:
            report["keep"] = _needed(report, options.limit)
        reports.append(report)
        print(_line(report), flush=True)
        if options.json:
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            write_json(options.json, {"versions": versions, "cycles": reports})
    print(table(reports))
    return int(any(report["status"] in _FAILED for report in reports))


def _chosen(seed: int, names: Sequence[str], kind: str | None) -> tuple[str, str]:
    """An architecture and its kind: of those given in turn, else a random one."""
    rng = Random(f"{seed}/architecture")
    if names:
        name = names[seed % len(names)]
        return name, kind or next(each for each in _FIRST if name in architectures(each))
    chosen = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    return rng.choice(architectures(chosen)), chosen


def _run(seed: int, name: str, kind: str, keep: Sequence[int] | None, limit_s: float) -> dict[str, Any]:
    argument = {"seed": seed, "name": name, "kind": kind, "keep": keep}
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "cycle"
        outcome = run_child("benchmarks.cycles.one", argument, limit_s=limit_s, files=files, environment=_ENVIRONMENT)
    return {**argument, "seconds": round(outcome.seconds, 1), **_reported(outcome)}


def _reported(outcome: Outcome) -> dict[str, Any]:
    """The child's own report, or why there is none."""
    report: dict[str, Any] = outcome.notes.get("report", {})
    return report if outcome.ok else {"status": outcome.status, "detail": outcome.reason, **report}


def _needed(report: dict[str, Any], limit_s: float) -> list[int]:
    """Positions of the actions without any one of which the cycle does not fail."""
    needed = sorted({int(line.split(":")[0]) for line in report["story"] if line[:1].isdigit()})
    for position in list(needed):
        fewer = [each for each in needed if each != position]
        if fewer and _run(report["seed"], report["name"], report["kind"], fewer, limit_s)["status"] in _FAILED:
            needed = fewer
    return needed


def _line(report: dict[str, Any]) -> str:
    what = f"{report['seed']} {report['name']} ({report['kind']}): {report['status']} in {report['seconds']} s"
    if report["status"] not in _FAILED:
        return what
    keep = f" --keep {' '.join(map(str, report['keep']))}" if report["keep"] else ""
    again = f"python -m benchmarks.cycles --seed {report['seed']} --cycles 1 --architecture {report['name']}"
    story = "\n".join(f"    {line}" for line in report.get("story", ()))
    return f"{what}\n{report['detail']}\n{story}\n  again: {again} --kind {report['kind']}{keep}"


def table(reports: Sequence[dict[str, Any]]) -> str:
    """A row a cycle, and how many there are of each status."""
    rows = [
        (r["seed"], r["name"], r["kind"], "Inductor" if r.get("inductor") else "FX", r["status"], r.get("compared"),
         r.get("graphs"), r.get("refusals"), r.get("steps"), r["seconds"])
        for r in reports
    ]  # fmt: skip
    heads = (
        "seed",
        "architecture",
        "kind",
        "segments",
        "status",
        "compared",
        "graphs",
        "budgets refused",
        "steps",
        "s",
    )
    counts = Counter(report["status"] for report in reports)
    return f"{tabulate(rows, heads)}\n\n{', '.join(f'{count} {status}' for status, count in counts.most_common())}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What is run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cycles", description=(cycles.__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first cycle; the next ones follow")
    parser.add_argument("--cycles", type=int, default=10, help="how many")
    parser.add_argument("--architecture", nargs="+", default=[], metavar="NAME", help="these in turn (default: any)")
    parser.add_argument(
        "--kind", choices=sorted(FACTORIES), help="of model (default: any, or the architecture's first)"
    )
    parser.add_argument("--keep", type=int, nargs="+", metavar="POSITION", help="only these actions of each cycle")
    parser.add_argument("--minimise", action="store_true", help="try which actions a failing cycle needs")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each cycle (default: 300)")
    parser.add_argument("--json", type=output_file, help="write the reports here, anew behind each cycle")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
