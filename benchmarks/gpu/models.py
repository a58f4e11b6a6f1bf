"""Small models of several architectures, generations of them, and compilations whose offloading is made sure of."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
)

import hetegen_compile
from benchmarks.gpu.settings import Checks, Settings, require
from hetegen_compile.accelerators import open_accelerator
from hetegen_compile.backend import hetegen
from hetegen_compile.bench.weights import parameter_bytes
from hetegen_compile.calibration import write_profile
from hetegen_compile.cost_model import HardwareProfile, KernelChoice, RateCurve, RateTable, load_profile
from hetegen_compile.host_kernels import LINEAR, TILED, VECTORISED
from hetegen_compile.passes.context import Refusal
from hetegen_compile.reports.schedule import Schedule

VOCABULARY = 512
WINDOW = 12
"""Tokens of the sliding windows: more than the prompt, fewer than prompt and answer."""
PROMPT, NEW_TOKENS = 9, 12

_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, **_TOKENS,
}  # fmt: skip

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "opt": lambda: OPTConfig(
        hidden_size=256, ffn_dim=512, num_hidden_layers=4, num_attention_heads=4, word_embed_proj_dim=256,
        max_position_embeddings=128, **_TOKENS,
    ),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=WINDOW),
    "mixtral": lambda: MixtralConfig(**_SIZES, num_local_experts=8, num_experts_per_tok=2),
    "gpt2": lambda: GPT2Config(n_embd=256, n_layer=4, n_head=4, n_positions=128, **_TOKENS),
    "gemma2": lambda: Gemma2Config(**_SIZES, head_dim=64, sliding_window=WINDOW, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**_SIZES),
}  # fmt: skip


def small_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with weights large enough that its tokens differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6.0 if weight.dim() > 1 else 1.0)
    return model.to(dtype)


def prompts(batch: int = 1) -> Tensor:
    """Random tokens, the same each time."""
    return torch.randint(4, VOCABULARY, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))


def generate(model: Any, batch: int = 1, cache: str | None = None, **more: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens and their logits."""
    prompt = prompts(batch)
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
        do_sample=False, cache_implementation=cache, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        **more,
    )  # fmt: skip
    return found.sequences, torch.stack(found.logits)


def overhead_bytes(settings: Settings) -> int:
    """What a budget has to hold beside the plan: workspaces and rounding of a device's libraries."""
    accelerator = open_accelerator(settings.accelerator)
    try:
        return sum(accelerator.overhead_bytes().values())
    finally:
        accelerator.close()


def compile_small(model: Any, settings: Settings, *, share: float | None = 0.5, **options: Any) -> None:
    """Compile with a budget of a share of the weights (None: no budget) beside what libraries take."""
    torch._dynamo.reset()
    gc.collect()  # graphs of earlier models that are still alive share the accelerator and its smallest budget
    if share is not None:
        options["gpu_memory"] = int(parameter_bytes(model) * share) + overhead_bytes(settings)
    fixed = {"accelerator": settings.accelerator, "hardware": _hardware(settings), "print_schedule": False}
    model.compile(backend=hetegen, options=fixed | options)


def _hardware(settings: Settings) -> str:
    """A profile that makes plans the same wherever this runs; few tokens are the kernels' of our own, as a rule."""
    path = settings.path / "checked-profile.json"
    if not path.exists():
        write_profile(path, _checked_profile())
    return str(path)


def _checked_profile() -> HardwareProfile:
    preset = load_profile("cpu-emulated")
    choice = KernelChoice(((1.0, TILED.name), (2.0, VECTORISED.name), (64.0, LINEAR.name)))
    kernels = dict.fromkeys(("float32", "bfloat16", "float16"), choice)
    return replace(preset, host=replace(preset.host, linear_kernels=kernels, ahead_bytes=8 << 20))


def slow_host(settings: Settings) -> str:
    """The same with a host so slow that a mixture's experts are streamed, whatever the tokens."""
    path = settings.path / "slow-host-profile.json"
    if not path.exists():
        profile = _checked_profile()
        tables = {
            dtype: RateTable(tuple(
                (size, RateCurve(tuple((tokens, rate / 1e4) for tokens, rate in curve.points)))
                for size, curve in table.curves
            ))
            for dtype, table in profile.host.linear_bytes_per_s.items()
        }  # fmt: skip
        write_profile(path, replace(profile, host=replace(profile.host, linear_bytes_per_s=tables)))
    return str(path)


class Watched:
    """The schedules that were made inside the block: they are to be split and streamed."""

    def __enter__(self) -> Watched:
        self._known = hetegen_compile.schedules()  # kept alive, so that no new one has the address of an old one
        return self

    def made(self) -> list[Schedule]:
        """Those until now."""
        known = set(map(id, self._known))
        return [schedule for schedule in hetegen_compile.schedules() if id(schedule) not in known]

    def __exit__(self, *_: object) -> None:
        self.schedules = self.made()

    def require_offloaded(self, *, host: bool = True, streamed: bool = True, experts: bool = False) -> dict[str, Any]:
        """Figures of what was made; AssertionError where something was not moved, or refused.

        A segment that Inductor cannot compile runs as plain FX code: no wrong result, but counted and told. With
        ``experts`` stacks of them have to be on the host in some, which is a refusal, too.
        """
        require(bool(self.schedules), "hetegen compiled nothing")
        on_host = 0
        for schedule in self.schedules:
            stacks = [one for one in schedule.refusals if experts and "stacked weights do not fit" in one.reason]
            left = [one for one in schedule.refusals if not _is_plain_segment(one) and one not in stacks]
            refused = [f"{one.where}: {one.reason}" for one in left]
            require(not refused, f"refused: {refused}")
            on_host += len(stacks)
            require(schedule.host_bytes > 0 or not host, "no row on the host")
            require(schedule.streamed_bytes > 0 or not streamed, "nothing was streamed")
        require(bool(on_host) == experts, "no experts on the host")
        return {
            "graphs": len(self.schedules),
            "host_bytes": max(s.host_bytes for s in self.schedules),
            "streamed_bytes": max(s.streamed_bytes for s in self.schedules),
            "pinned_bytes": max(s.host_pinned_bytes for s in self.schedules),
            "segments_that_did_not_compile": sum(_is_plain_segment(r) for s in self.schedules for r in s.refusals),
            **self._fullest(),
        }

    def _fullest(self) -> dict[str, int]:
        """Of the schedule that came nearest to its budget: its peak, and the budget."""
        fullest = max(self.schedules, key=lambda s: s.accelerator_peak_bytes / s.budget_bytes)
        return {"peak_bytes": fullest.accelerator_peak_bytes, "budget_bytes": fullest.budget_bytes}


def _is_plain_segment(refusal: Refusal) -> bool:
    return "its compiler failed" in refusal.reason


def require_like(expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> float:
    """Equal tokens and close logits in float32; the largest difference of a logit."""
    require(torch.equal(expected[0], found[0]), f"tokens {found[0].tolist()} are not eager's {expected[0].tolist()}")
    difference = (expected[1] - found[1]).abs().max().item()
    scale = expected[1].abs().max().item()
    require(difference <= 1e-3 * scale, f"a logit differs by {difference:.3g}; the largest logit is {scale:.3g}")
    return difference


def finish_within_budgets(checks: Checks) -> None:
    """Check the peaks that were told, then raise ChecksFailedError if a check failed."""
    checks.check("no peak above its budget", partial(budgets_kept, checks.found))
    checks.finish()


def budgets_kept(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all checks so far; a check of its own, for a wrong budget is not a wrong result."""
    shares: dict[str, float] = {}
    for entry in found:
        for name, told in _figures(entry["check"], entry["detail"]):
            shares[name] = told["peak_bytes"] / told["budget_bytes"]
    require(bool(shares), "no check has told its peak")
    require(max(shares.values()) <= 1, f"peak over budget: {shares}")
    return shares


def _figures(name: str, detail: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a check tells of peaks and budgets, also where it has several."""
    if isinstance(detail, dict) and "budget_bytes" in detail:
        yield name, detail
    elif isinstance(detail, dict):
        for key, part in detail.items():
            yield from _figures(f"{name}, {key}", part)
