"""First contact with a GPU: correctness, then figures, in one command with results kept after each stage.

    python -m benchmarks.gpu [--out gpu.json] [--accelerator auto] [--stages environment,correctness,speed]

On a machine without a GPU the same stages run on the emulated accelerator as a rehearsal; their times then say
nothing. Stages: ``environment`` (versions, device, memory limits), ``correctness`` (generation equal to eager
for several architectures and cache kinds in float32, with host rows and streamed bytes asserted),
``speed`` (decode of a random-weight OPT: split, all streamed, CPU only, each with its prediction).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate
from transformers import GPT2Config, LlamaConfig, MistralConfig, OPTConfig, PretrainedConfig

import hetegen_compile
from hetegen_compile.backend import hetegen

SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 512}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL, intermediate_size=512, num_key_value_heads=2),
    "mistral": MistralConfig(**SMALL, intermediate_size=512, num_key_value_heads=2, sliding_window=16),
    "opt": OPTConfig(**SMALL, ffn_dim=512, word_embed_proj_dim=256, max_position_embeddings=128),
    "gpt2": GPT2Config(n_embd=256, n_layer=4, n_head=4, vocab_size=512, n_positions=128),
}
SIZES = {
    "125m": {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "6.7b": {"hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40, "num_attention_heads": 40},
}


def main(argv: list[str] | None = None) -> int:
    """Run the stages; the exit status is 1 if one of them failed."""
    args = _arguments(argv)
    stages: dict[str, Callable[[argparse.Namespace], Any]] = {
        "environment": environment, "correctness": correctness, "speed": speed,
    }
    results: dict[str, Any] = {}
    failed = False
    for name in args.stages.split(","):
        started = time.perf_counter()
        try:
            results[name] = stages[name](args)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
            failed = True
        results[f"{name}_seconds"] = round(time.perf_counter() - started, 1)
        print(f"== {name}\n{_shown(results[name])}\n", flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(results, indent=2))
    return int(failed)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file, written after each stage")
    parser.add_argument("--accelerator", default="auto", choices=["auto", "cuda", "emulated"])
    parser.add_argument("--stages", default="environment,correctness,speed")
    parser.add_argument("--model", default="6.7b", choices=SIZES, help="size of the OPT of the speed stage")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--gpu-memory", default="4GiB", help="budget of the speed stage")
    parser.add_argument("--hardware", default="auto")
    parser.add_argument("--new-tokens", type=int, default=16)
    return parser.parse_args(argv)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures were measured on."""
    cuda = torch.cuda.is_available() and args.accelerator != "emulated"
    found = {
        "accelerator": torch.cuda.get_device_name() if cuda else "emulated (times say nothing about speed)",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        found |= {"cuda": torch.version.cuda, "gpu_memory": properties.total_memory}
        found["copy_engines"] = getattr(properties, "async_engine_count", None)
    return found


def correctness(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Greedy generation against eager, float32; raises on the first difference."""
    return [
        _compare_with_eager(name, config, cache, args) for name, config in CONFIGS.items() for cache in (None, "static")
    ]


def _compare_with_eager(
    name: str, config: PretrainedConfig, cache: str | None, args: argparse.Namespace
) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6.0 if weight.dim() > 1 else 1.0)  # so that the answers are not all one token
    prompt = torch.randint(4, 512, (2, 9))
    eager = _generate(model, prompt, 16, cache)
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    known = len(hetegen_compile.schedules())
    _compile(model, {"accelerator": args.accelerator, "gpu_memory": weights // 2, "split": 0.5})
    result = _generate(model, prompt, 16, cache)
    schedules = hetegen_compile.schedules()[known:]
    if not schedules or not all(s.host_bytes > 0 and s.streamed_bytes > 0 for s in schedules):
        raise AssertionError(f"{name}, {cache} cache: nothing was split or streamed")
    if not torch.equal(eager, result):
        raise AssertionError(f"{name}, {cache or 'dynamic'} cache: tokens differ from eager's")
    return {"model": name, "cache": cache or "dynamic", "graphs": len(schedules), "tokens": "equal"}


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Decode steps of a random-weight OPT: measured and predicted tokens/s of three splits of one capture."""
    torch._dynamo.reset()
    config = OPTConfig(**SIZES[args.model], word_embed_proj_dim=SIZES[args.model]["hidden_size"])
    config.eos_token_id = None
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    options = {"accelerator": args.accelerator, "gpu_memory": args.gpu_memory, "hardware": args.hardware}
    _compile(model, options)
    prompt = torch.randint(4, 5000, (1, 32))
    rows = []
    for name, split in (("split", "auto"), ("all streamed", 0.0), ("CPU only", 1.0)):
        with hetegen_compile.override_split(split):  # type: ignore[arg-type]
            _generate(model, prompt, args.new_tokens, "static")
        found = [s for s in hetegen_compile.schedules() if s.tokens == (1, 1) and s.split == split][-1]
        rows.append({
            "way": name, "measured tokens/s": _rate(found.measured_step_s),
            "predicted": _rate(found.predicted_step_s), "floor": _rate(found.floor_s),
            "peak bytes": found.accelerator_peak_bytes, "budget bytes": found.budget_bytes,
        })
    return rows


def _compile(model: Any, options: dict[str, Any]) -> None:
    model.compile(backend=hetegen, options={**options, "print_schedule": False})


def _generate(model: Any, prompt: torch.Tensor, new_tokens: int, cache: str | None) -> torch.Tensor:
    result: torch.Tensor = model.generate(
        prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, cache_implementation=cache,
        attention_mask=torch.ones_like(prompt), pad_token_id=0,
    )
    return result


def _rate(step_s: float | None) -> float | None:
    return round(1 / step_s, 3) if step_s else None


def _shown(result: Any) -> str:
    if isinstance(result, list):
        table: str = tabulate(result, headers="keys")
        return table
    return "\n".join(f"{key}: {value}" for key, value in result.items())


if __name__ == "__main__":
    raise SystemExit(main())
