"""``python -m benchmarks.gpu``: the stages one after the other, one result file."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import benchmarks.gpu as gpu
from benchmarks.children import write_json
from benchmarks.gpu.environment import hardware_line
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.stages import GROUPS, REHEARSED, STAGES, Ended, run_stages, stages_for
from benchmarks.random_models import DTYPES

RESULT = "result.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 1 if one of correctness did not end well."""
    settings, names = parse_arguments(argv)
    stages = stages_for(settings, names)
    settings.path.mkdir(parents=True, exist_ok=True)
    for name in (RESULT, *(f"{stage.name}.json" for stage in stages)):  # of an earlier run
        (settings.path / name).unlink(missing_ok=True)
    if any(stage.name == "calibration" for stage in stages):
        settings.profile_path.unlink(missing_ok=True)
    started = time.monotonic()
    result: dict[str, Any] = {
        "hardware": hardware_line(settings), "date": str(datetime.date.today()), "emulated": not settings.cuda,
        "stages": {},
    }  # fmt: skip
    ended = []
    for one in run_stages(stages, settings):
        ended.append(one)
        result["stages"][one.stage.name] = asdict(one.outcome)
        result |= {"correct": not any(other.wrong for other in ended), "seconds": round(time.monotonic() - started)}
        write_json(settings.path / RESULT, result)
        print(f"== {shown(one)}\n", flush=True)
    print(f"{summary(ended)}\n\n{result['hardware']}\n{settings.path / RESULT}, {result.get('seconds', 0)} s")
    return int(any(one.wrong for one in ended))


def shown(one: Ended) -> str:
    """A stage's heading, its checks or its table, and why it is not ok."""
    lines = [f"{one.stage.name}: {one.outcome.status}, {one.outcome.seconds:.0f} s"]
    checks = one.outcome.notes.get("checks")
    if checks:
        lines.append(tabulate([(c["result"], c["check"], f"{c['seconds']:.1f} s") for c in checks], tablefmt="plain"))
        lines += [f"  {c['check']}: {c['detail']}" for c in checks if c["result"] == "FAILED"]
    lines += one.outcome.notes.get("table", [])
    if one.outcome.reason:
        lines.append(one.outcome.reason)
    return "\n".join(lines)


def summary(ended: Sequence[Ended]) -> str:
    """All stages in one table."""
    rows = [
        (one.stage.name, one.outcome.status, f"{one.outcome.seconds:.0f}", one.outcome.reason.partition("\n")[0][:80])
        for one in ended
    ]
    return str(tabulate(rows, headers=["stage", "status", "s", "why"], disable_numparse=True))


def parse_arguments(argv: Sequence[str] | None) -> tuple[Settings, list[str]]:
    """Of the command line; the stages that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=gpu.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    every = [stage.name for stage in STAGES]
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for results (default: %(default)s)")
    parser.add_argument("--accelerator", default="auto", choices=["auto", "cuda", "emulated"])
    parser.add_argument("--stages", nargs="+", default=[], choices=[*GROUPS, *every, REHEARSED], help="default: all")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: %(default)s)")
    parser.add_argument(
        "--hardware", help="profile where calibration did not run or fail; default: the preset of the device, else auto"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the models that are compared")
    arguments = parser.parse_args(argv)
    accelerator = arguments.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "emulated"
    hardware = arguments.hardware or ("a10-xeon" if accelerator == "emulated" else preset_of_the_device())
    settings = Settings(accelerator, str(arguments.out.absolute()), hardware, arguments.minutes, arguments.dtype)
    missing = set(arguments.stages) - GROUPS.keys() - {one.name for one in stages_for(settings, arguments.stages)}
    if missing:
        parser.error(f"no stage with accelerator {accelerator}: {', '.join(sorted(missing))}")
    return settings, arguments.stages


def preset_of_the_device() -> str:
    """The preset that is meant for this device, should calibration fail; "auto" (calibrate again) if there is none."""
    name = torch.cuda.get_device_name()
    presets = {"H100": "h100-server", "H200": "h200-server", "A10": "a10-xeon", "4090": "rtx4090-desktop"}
    return next((preset for part, preset in presets.items() if part in name), "auto")


if __name__ == "__main__":
    sys.exit(main())
