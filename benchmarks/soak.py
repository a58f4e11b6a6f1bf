"""Hostile timing and endurance: the same tokens whatever the delays are, and level memory over thousands of steps.

    python -m benchmarks.soak --seeds 200 --steps 5000 --json soak.json

Part one generates with random delays on the host thread and each stream of the emulated accelerator (lanes of
different speed, another set for each seed), with NaN in every released slot; tokens, logits and the cache must be
bit-identical for all seeds and, for the tokens, eager's. Part two runs decode steps without delays and compares
resident memory, bytes held on the accelerator and the number of threads of its last quarter with its second.
Exit status 1 if either fails. Nothing here says anything about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.arguments import output_file
from hetegen_compile.accelerators import EmulatedAccelerator
from hetegen_compile.runtime import live_runtimes

_SIZES: dict[str, Any] = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            **_SIZES,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **_SIZES)),
}  # fmt: skip
CACHES = ("dynamic", "static")
LEVEL = 1.02
"""Growth of resident memory between two quarters of a soak that still counts as level."""


@dataclass(frozen=True)
class SeedResult:
    """Generations of one model and cache under many seeds."""

    model: str
    cache: str
    seeds: int
    tokens: int
    differing_seeds: tuple[int, ...]
    equals_eager: bool


@dataclass(frozen=True)
class SoakResult:
    """A soak's second and last quarter: medians of resident and held bytes, and the highest thread counts."""

    model: str
    cache: str
    steps: int
    seconds: float
    resident_bytes: tuple[int, int]
    held_bytes: tuple[int, int]
    threads: tuple[int, int]

    @property
    def is_level(self) -> bool:
        """Whether nothing grew."""
        return (
            self.resident_bytes[1] <= self.resident_bytes[0] * LEVEL
            and self.held_bytes[1] <= self.held_bytes[0]
            and self.threads[1] <= self.threads[0]
        )


def main(argv: list[str] | None = None) -> int:
    """Run both parts and print a table of each."""
    options = _options(argv)
    torch.set_num_threads(1)
    seeded: list[SeedResult] = []
    soaked: list[SoakResult] = []
    for name in options.models:
        for cache in options.caches:
            model = _compiled(name)
            if options.seeds:
                seeded.append(run_seeds(name, model, cache, options.seeds, options.tokens))
            if options.steps:
                soaked.append(run_soak(name, model, cache, options.steps, options.tokens))
            torch._dynamo.reset()
    _print(seeded, soaked)
    if options.json:
        report = {"machine": _machine(), "seeds": list(map(asdict, seeded)), "soak": list(map(asdict, soaked))}
        options.json.write_text(json.dumps(report, indent=1))
    failed = any(r.differing_seeds or not r.equals_eager for r in seeded) or any(not r.is_level for r in soaked)
    return int(failed)


def run_seeds(name: str, model: PreTrainedModel, cache: str, seeds: int, tokens: int) -> SeedResult:
    """Generate once for each seed and compare with the first result, bit by bit."""
    eager = _generate(_model(name), cache, tokens)
    first = _generate(model, cache, tokens)
    (accelerator,) = _accelerators()
    differing = []
    for seed in tqdm(range(seeds), desc=f"{name}, {cache} cache, seeds", file=sys.stderr):
        accelerator.reseed(seed)
        if not _identical(_generate(model, cache, tokens), first):
            differing.append(seed)
    accelerator.reseed(None)
    same_tokens = torch.equal(eager[0], first[0])
    return SeedResult(name, cache, seeds, tokens, tuple(differing), same_tokens)


def run_soak(name: str, model: PreTrainedModel, cache: str, steps: int, tokens: int) -> SoakResult:
    """Generate again and again until ``steps`` tokens are made, and look at what the process holds."""
    _generate(model, cache, tokens)
    (accelerator,) = _accelerators()
    samples: list[tuple[int, int, int]] = []
    started = time.perf_counter()
    for _ in tqdm(range(max(8, steps // tokens)), desc=f"{name}, {cache} cache, soak", file=sys.stderr):
        _generate(model, cache, tokens)
        held = sum(accelerator.counters.held_bytes.values())
        samples.append((_resident_bytes(), held, threading.active_count()))
    quarter = len(samples) // 4
    second, last = samples[quarter : 2 * quarter], samples[-quarter:]
    return SoakResult(
        name, cache, len(samples) * tokens, time.perf_counter() - started,
        resident_bytes=(_median(second, 0), _median(last, 0)),
        held_bytes=(_median(second, 1), _median(last, 1)),
        threads=(max(s[2] for s in second), max(s[2] for s in last)),
    )  # fmt: skip


# ---- helpers -------------------------------------------------------------------------------------------------


def _model(name: str) -> PreTrainedModel:
    """The model with random weights, scaled up so that it does not repeat one token; the same at each call."""
    torch.manual_seed(0)
    model: PreTrainedModel = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    return model


def _compiled(name: str) -> PreTrainedModel:
    model = _model(name)
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.compile(
        backend="hetegen",
        options={"accelerator": "emulated", "split": 0.5, "gpu_memory": nbytes * 3 // 4, "print_schedule": False},
    )
    return model


def _generate(model: PreTrainedModel, cache: str, tokens: int) -> list[torch.Tensor]:
    """Sequences, logits, and what the cache holds."""
    prompt = torch.randint(2, 256, (1, 7), generator=torch.Generator().manual_seed(1))
    found: Any = model.generate(  # type: ignore[operator]
        prompt, attention_mask=torch.ones_like(prompt), cache_implementation=None if cache == "dynamic" else cache,
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    held = [tensor for layer in found.past_key_values.layers for tensor in (layer.keys, layer.values)]
    return [found.sequences, torch.stack(found.logits), *held]


def _identical(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _accelerators() -> list[EmulatedAccelerator]:
    found = [runtime.accelerator for runtime in live_runtimes()]
    return [accelerator for accelerator in found if isinstance(accelerator, EmulatedAccelerator)]


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _median(samples: list[tuple[int, int, int]], field: int) -> int:
    return int(statistics.median(sample[field] for sample in samples))


def _machine() -> dict[str, object]:
    return {"cpus": os.cpu_count(), "torch": torch.__version__, "accelerator": "emulated"}


def _print(seeded: list[SeedResult], soaked: list[SoakResult]) -> None:
    print(f"emulated accelerator, torch {torch.__version__}, {os.cpu_count()} CPUs")
    if seeded:
        seeds = [(r.model, r.cache, r.seeds, r.tokens, len(r.differing_seeds), r.equals_eager) for r in seeded]
        print(tabulate(seeds, ["model", "cache", "seeds", "tokens", "seeds that differ", "tokens are eager's"]))
    if soaked:
        rows = [
            (r.model, r.cache, r.steps, round(r.seconds), *(round(b / 2**20, 1) for b in r.resident_bytes),
             *r.held_bytes, *r.threads, r.is_level)
            for r in soaked
        ]  # fmt: skip
        heads = ["model", "cache", "steps", "s", "RSS MiB 2nd quarter", "last", "held bytes", "last", "threads", "last"]
        print(tabulate(rows, [*heads, "level"]))


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=200, help="random timings per model and cache; 0: none")
    parser.add_argument("--steps", type=int, default=4000, help="decode steps per model and cache; 0: none")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each generation")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["llama"])
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--json", type=output_file, help="write the results here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
