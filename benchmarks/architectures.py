"""Which architectures of the installed transformers run like eager, and how much of each is split.

    python -m benchmarks.architectures --json architectures.json
    python -m benchmarks.architectures --only llama jamba --cache static

For each architecture a model of two layers with random weights generates a few tokens in eager and compiled, on
the emulated accelerator with half of every Linear's rows on the host, and tokens and logits are compared. Each
runs in a process of its own with a time limit, so that one that crashes or hangs costs only its own row. With
``--json`` finished rows are kept and not run again. Segments run as plain FX code unless ``--inductor``.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers
from tabulate import tabulate
from transformers.models.auto import modeling_auto

from benchmarks.arguments import output_file
from benchmarks.one_architecture import FACTORIES, REASON_CHARACTERS, Outcome, measure

KINDS = tuple(FACTORIES)
CACHES = ("dynamic", "static")


def architectures(kind: str) -> list[str]:
    """Model types that transformers maps to a class of this kind."""
    mapping = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "speech": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "vision": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    return list(mapping[kind])


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; the exit status is 1 if something that eager can run differs or fails."""
    arguments = _arguments(argv)
    if arguments.one:
        logging.disable(logging.CRITICAL)
        with contextlib.redirect_stdout(sys.stderr):
            faulthandler.dump_traceback_later(0.9 * arguments.limit)
            started_s = time.perf_counter()
            outcome = measure(arguments.one, arguments.kind, arguments.cache, inductor=arguments.inductor)
            outcome = replace(outcome, seconds=round(time.perf_counter() - started_s, 1))
        print(json.dumps(asdict(outcome)))
        return 0
    outcomes = _load(arguments.json)
    done = {outcome.key for outcome in outcomes}
    names = arguments.only or architectures(arguments.kind)
    for name in names:
        if (name, arguments.kind, arguments.cache, arguments.inductor) not in done:
            outcomes.append(_in_a_process(name, arguments))
            print(_line(outcomes[-1]), flush=True)
            _store(arguments.json, outcomes)
    print(table(outcomes))
    return int(any(outcome.status in ("differs", "error", "time limit") for outcome in outcomes))


def _places(dump: str) -> list[str]:
    """Place and function of each frame that faulthandler wrote, innermost first, without this machine's folders."""
    frames = re.findall(r'^  File "(.+)", line (\d+) in (.+)$', dump, flags=re.MULTILINE)
    return ["{}:{} {}".format("/".join(Path(file).parts[-3:]), line, function) for file, line, function in frames]


def _in_a_process(name: str, arguments: argparse.Namespace) -> Outcome:
    command = [sys.executable, "-m", "benchmarks.architectures", "--one", name, "--kind", arguments.kind]
    command += ["--limit", str(arguments.limit), "--cache", arguments.cache]
    command += ["--inductor"] if arguments.inductor else []
    blank = Outcome(name, arguments.kind, arguments.cache, "time limit", inductor=arguments.inductor)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=arguments.limit, env=environment, check=False
        )
    except subprocess.TimeoutExpired as error:
        detail = f"more than {arguments.limit:g} s; was at {'; '.join(_places(_text(error.stderr)))}"
        return replace(blank, detail=detail[:REASON_CHARACTERS], seconds=arguments.limit)
    if found.returncode != 0:
        lines = found.stderr.strip().splitlines() or [f"exit status {found.returncode}"]
        return replace(blank, status="error", detail=lines[-1][:REASON_CHARACTERS])
    return Outcome(**json.loads(found.stdout.strip().splitlines()[-1]))


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _load(path: Path | None) -> list[Outcome]:
    if path is None or not path.exists():
        return []
    return [Outcome(**row) for row in json.loads(path.read_text())["outcomes"]]


def _store(path: Path | None, outcomes: Iterable[Outcome]) -> None:
    if path is not None:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        rows = [asdict(outcome) for outcome in outcomes]
        path.write_text(json.dumps({"versions": versions, "outcomes": rows}, indent=1))


def _line(outcome: Outcome) -> str:
    return f"{outcome.name} ({outcome.kind}, {outcome.cache}): {outcome.status} {outcome.detail}"


def table(outcomes: Sequence[Outcome]) -> str:
    """All rows, and how many there are of each status."""
    rows = [
        (o.name, o.kind, o.cache, "Inductor" if o.inductor else "FX", o.status, o.graphs, o.on_host,
         None if o.split_share is None else round(100 * o.split_share), o.seconds,
         (o.detail or "; ".join(o.refusals))[:100])
        for o in sorted(outcomes, key=lambda o: (o.kind, o.cache, o.inductor, o.status, o.name))
    ]  # fmt: skip
    headers = ("architecture", "kind", "cache", "segments", "status", "graphs", "on host", "split %", "s", "notes")
    counts = Counter(outcome.status for outcome in outcomes)
    return f"{tabulate(rows, headers)}\n\n{', '.join(f'{n} {status}' for status, n in counts.most_common())}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.architectures", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures (default: all of the kind)")
    parser.add_argument("--kind", choices=KINDS, default="causal")
    parser.add_argument("--cache", choices=CACHES, default="dynamic")
    parser.add_argument("--inductor", action="store_true", help="compile segments with Inductor")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for each (default: 120)")
    parser.add_argument("--json", type=output_file, help="keep finished rows here and go on from them")
    parser.add_argument("--one", metavar="NAME", help="this one, in this process; prints its row as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
