"""Host memory that compiling and running with hetegen takes beyond plain Inductor, seen from outside the process.

    python -m benchmarks.memory --json memory.json

Each case is a process of its own: it builds a Llama of random weights (``anonymous``: in memory; ``mapping``:
by ``from_pretrained`` from safetensors files), says so, and compiles and runs it at two lengths of prompt. The
parent resets the process's peak of resident memory before that (``/proc/PID/clear_refs``) and reads it
afterwards (``VmHWM`` in ``/proc/PID/status``). The emulated accelerator plays its device in host memory, which
a real one would not take: its peak, as its own counters say, is subtracted. What it holds at other times than
at the process's peak is then subtracted too much, by --gpu-memory at most, so that is small. Linux only.

Exit status 1: some case takes more than 150 MB and 1 % of its weights beyond Inductor.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.arguments import output_file
from hetegen_compile.calibration import this_machine
from hetegen_compile.options import format_bytes, parse_bytes

KINDS = ("anonymous", "mapping")
BACKENDS = ("inductor", "hetegen")
PROMPTS = (16, 1)
ALLOWED_BYTES = 150_000_000
ALLOWED_SHARE = 0.01
WIDTH = 2048


@dataclass(frozen=True)
class Case:
    """One process.

    Attributes:
        kind, backend: what ran.
        weight_bytes: of the model.
        built_bytes: resident when the model was built.
        peak_bytes: most that was resident from then on, less ``accelerator_bytes``.
        accelerator_bytes: peak of the emulated accelerator's own memory.
        streamed_bytes: weights of a step that go over the link.
        host_memory: what became of the storages that are streamed from.
    """

    kind: str
    backend: str
    weight_bytes: int
    built_bytes: int
    peak_bytes: int
    accelerator_bytes: int
    streamed_bytes: int
    host_memory: Sequence[str]


@dataclass(frozen=True)
class Comparison:
    """A model under hetegen beside the same one under Inductor."""

    kind: str
    weight_bytes: int
    excess_bytes: int
    allowed_bytes: int

    @property
    def within(self) -> bool:
        """Whether the excess is what is allowed."""
        return self.excess_bytes <= self.allowed_bytes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, compare, print."""
    arguments = _arguments(argv)
    if arguments.child:
        kind, backend, folder = arguments.child
        _child(kind, backend, folder, arguments)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        _run(arguments, "write", "inductor", folder)
        cases = [_measure(arguments, kind, backend, folder) for kind in arguments.kinds for backend in BACKENDS]
    found = [_compare(cases, kind) for kind in arguments.kinds]
    split = "" if arguments.split is None else f", split {arguments.split}"
    hardware = f"{this_machine(cuda=False)}, emulated accelerator of {arguments.gpu_memory}{split}"
    print(f"{_table(cases)}\n\n{_comparison_table(found)}\n\n{hardware}")
    if arguments.json:
        data = {"hardware": hardware, "cases": [*map(asdict, cases)], "comparisons": [*map(asdict, found)]}
        arguments.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0 if all(one.within for one in found) else 1


# ---- the parent ----------------------------------------------------------------------------------------------


def _measure(arguments: argparse.Namespace, kind: str, backend: str, folder: str) -> Case:
    child = _start(arguments, kind, backend, folder)
    assert child.stdin is not None, "the child was given a pipe"
    _answer(child)
    built = _status_bytes(child.pid, "VmRSS")
    Path(f"/proc/{child.pid}/clear_refs").write_text("5")
    child.stdin.write("go on\n")
    child.stdin.flush()
    answer = _answer(child)
    peak = _status_bytes(child.pid, "VmHWM")
    child.communicate("done\n")
    return Case(kind, backend, built_bytes=built, peak_bytes=peak - answer["accelerator_bytes"], **answer)


def _run(arguments: argparse.Namespace, kind: str, backend: str, folder: str) -> None:
    _start(arguments, kind, backend, folder).communicate()


def _start(arguments: argparse.Namespace, *child: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.memory", "--layers", str(arguments.layers)]
    command += ["--gpu-memory", arguments.gpu_memory]
    command += [] if arguments.split is None else ["--split", str(arguments.split)]
    command += ["--child", *child]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _answer(child: subprocess.Popen[str]) -> dict[str, Any]:
    """The child's next line that is JSON."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            return answer
    raise RuntimeError(f"a case ended with status {child.wait()} before it was measured")


def _status_bytes(process: int, field: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _compare(cases: Sequence[Case], kind: str) -> Comparison:
    plain, ours = (next(c for c in cases if (c.kind, c.backend) == (kind, backend)) for backend in BACKENDS)
    allowed = ALLOWED_BYTES + round(ALLOWED_SHARE * ours.weight_bytes)
    return Comparison(kind, ours.weight_bytes, ours.peak_bytes - plain.peak_bytes, allowed)


def _table(cases: Sequence[Case]) -> str:
    rows = [
        (
            case.kind, case.backend, format_bytes(case.weight_bytes), format_bytes(case.built_bytes),
            format_bytes(case.peak_bytes), format_bytes(case.accelerator_bytes), format_bytes(case.streamed_bytes),
            ", ".join(case.host_memory),
        )
        for case in cases
    ]  # fmt: skip
    headers = ["weights in", "backend", "weights", "built", "peak", "accelerator", "streamed", "host memory"]
    return str(tabulate(rows, headers=headers, colalign=("left", "left", *["right"] * 5, "left")))


def _comparison_table(found: Sequence[Comparison]) -> str:
    rows = [
        (one.kind, format_bytes(one.excess_bytes), format_bytes(one.allowed_bytes), "yes" if one.within else "NO")
        for one in found
    ]
    return str(tabulate(rows, headers=["weights in", "beyond Inductor", "allowed", "within"]))


# ---- the child -----------------------------------------------------------------------------------------------


def _child(kind: str, backend: str, folder: str, arguments: argparse.Namespace) -> None:
    import torch

    torch.manual_seed(0)
    model = _model(kind, folder, arguments.layers)
    if kind == "write":
        model.save_pretrained(folder)
        return
    _say(weight_bytes=sum(parameter.nbytes for parameter in model.parameters()))
    sys.stdin.readline()
    _compile_and_run(model, backend, arguments)
    _say(weight_bytes=sum(parameter.nbytes for parameter in model.parameters()), **_reported())
    sys.stdin.readline()


def _model(kind: str, folder: str, layers: int) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if kind == "mapping":
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    config = LlamaConfig(
        vocab_size=4096, hidden_size=WIDTH, intermediate_size=11 * WIDTH // 4, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _compile_and_run(model: Any, backend: str, arguments: argparse.Namespace) -> None:
    import torch

    split = "auto" if arguments.split is None else arguments.split
    options: Any = {
        "accelerator": "emulated",
        "gpu_memory": arguments.gpu_memory,
        "split": split,
        "print_schedule": False,
    }
    options = options if backend == "hetegen" else None
    compiled: Any = torch.compile(model, backend=backend, dynamic=False, options=options)
    with torch.no_grad():
        for tokens in PROMPTS:
            for _ in range(2):
                compiled(torch.ones(1, tokens, dtype=torch.long), use_cache=False)


def _reported() -> dict[str, Any]:
    import hetegen_compile

    schedules = hetegen_compile.schedules()
    last = schedules[-1] if schedules else None
    return {
        "accelerator_bytes": max((schedule.accelerator_peak_bytes for schedule in schedules), default=0),
        "streamed_bytes": 0 if last is None else last.streamed_bytes,
        "host_memory": sorted({holding.how for schedule in schedules for holding in schedule.host_memory}),
    }


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--layers", type=int, default=5, help="layers of 205 MB of weights each")
    parser.add_argument("--gpu-memory", default="64MiB", help="budget of the emulated accelerator")
    parser.add_argument("--split", type=float, help="share of all rows on the host; default: the cost model's")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="where the weights lie")
    parser.add_argument("--json", type=output_file, metavar="OUT", help="write all figures to this file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    parse_bytes(arguments.gpu_memory)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
