"""How long a dry run takes and how much memory, by the depth of the model.

    python -m benchmarks.plan_speed --json plan_speed.json

Each depth is planned in a process of its own (peak memory is the process's). Processor time stands beside wall time:
on a machine that does something else too, only the former says what a dry run costs. The last column is processor
time a layer against that of the first depth of the same model: it stays at or below 1 if growth is linear.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.arguments import output_file
from hetegen_compile.calibration import this_machine

DEPTHS: dict[str, tuple[int, ...]] = {"opt-30b": (12, 24, 48), "opt-175b": (24, 96), "llama-3-70b": (20, 80)}
"""Layers that are planned; the last is the model's own depth."""

_WIDTHS: dict[str, dict[str, int]] = {
    "opt-30b": {"hidden_size": 7168, "ffn_dim": 28672, "num_attention_heads": 56, "word_embed_proj_dim": 7168},
    "opt-175b": {"hidden_size": 12288, "ffn_dim": 49152, "num_attention_heads": 96, "word_embed_proj_dim": 12288},
    "llama-3-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
        "vocab_size": 128256, "max_position_embeddings": 8192,
    },
}  # fmt: skip
_OPTIONS = {"hardware": "a10-xeon", "gpu_memory": "16GiB"}


@dataclass(frozen=True)
class Measurement:
    """One plan of a generation: 512 tokens in, 64 out, float16, batch 1."""

    model: str
    layers: int
    wall_s: float
    processor_s: float
    peak_rss_bytes: int
    predicted_tokens_per_s: float


def main(argv: Sequence[str] | None = None) -> int:
    """Plan each depth in a process of its own and print the table."""
    arguments = _arguments(argv)
    if arguments.one:
        print(json.dumps(asdict(_measure(arguments.models[0], arguments.one))))
        return 0
    found = [_in_a_process(model, layers) for model in arguments.models for layers in DEPTHS[model]]
    hardware = f"{this_machine(cuda=False)}; import of torch and transformers not counted in seconds"
    print(f"{_table(found)}\n\n{hardware}")
    if arguments.json:
        data = {"hardware": hardware, "measurements": [asdict(one) for one in found]}
        arguments.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_speed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", nargs="+", choices=DEPTHS, default=list(DEPTHS), help="default: all")
    parser.add_argument("--json", type=output_file, help="write the measurements to this file")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _in_a_process(model: str, layers: int) -> Measurement:
    command = [sys.executable, "-m", "benchmarks.plan_speed", "--models", model, "--one", str(layers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def _measure(model: str, layers: int) -> Measurement:
    from hetegen_compile import plan_generation

    config = _config(model, layers)
    torch.set_num_threads(1)
    started_s, processor_s = time.perf_counter(), time.process_time()
    plan = plan_generation(config, options=_OPTIONS)
    return Measurement(
        model=model,
        layers=layers,
        wall_s=time.perf_counter() - started_s,
        processor_s=time.process_time() - processor_s,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        predicted_tokens_per_s=plan.tokens_per_s,
    )


def _config(model: str, layers: int) -> Any:
    from transformers import LlamaConfig, OPTConfig

    cls: Any = LlamaConfig if model.startswith("llama") else OPTConfig
    return cls(num_hidden_layers=layers, **_WIDTHS[model])


def _table(found: Sequence[Measurement]) -> str:
    first: dict[str, float] = {}
    rows = []
    for one in found:
        layer_s = one.processor_s / one.layers
        base = first.setdefault(one.model, layer_s)
        rows.append(
            [one.model, one.layers, f"{one.wall_s:.1f}", f"{one.processor_s:.1f}", f"{one.peak_rss_bytes / 2**20:.0f}",
             f"{one.predicted_tokens_per_s:.2f}", f"{layer_s / base:.2f}"]
        )  # fmt: skip
    headers = ["model", "layers", "wall s", "processor s", "peak RSS MiB", "predicted tokens/s", "s a layer, to first"]
    text: str = tabulate(rows, headers=headers, disable_numparse=True, colalign=["left", *["right"] * 6])
    return text


if __name__ == "__main__":
    sys.exit(main())
