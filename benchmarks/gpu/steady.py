"""Stage ``steady``: no memory from the driver in a running loop, the budget as a guard, and teardown after teardown."""

from __future__ import annotations

import copy
import gc
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import hetegen_compile
from benchmarks.children import Notebook
from benchmarks.gpu.models import (
    VOCABULARY,
    Watched,
    compile_small,
    finish_within_budgets,
    generate,
    prompts,
    require_like,
    small_model,
)
from benchmarks.gpu.settings import NEEDS_CUDA, Checks, Settings, SkipError, require
from hetegen_compile.accelerators.growing import block_of
from hetegen_compile.runtime import live_runtimes

STEPS = 100
WARM_UP = 12
"""Steps until everything has been loaded, and launches have been recorded."""

TEARDOWNS = 20
SEQUENCES, LENGTH, GROWS = 8, 96, 12
"""Of caches that grow: enough for one of their tensors to be more than all that a step makes."""
_ROUNDED = 0.05
"""Of the largest logit: a wrong token in a cache changes more, bfloat16 less."""


def steady(settings: Settings, notebook: Notebook) -> None:
    """All checks; raises ChecksFailedError at the end if one failed."""
    checks = Checks(notebook)
    checks.check(f"no allocation from the driver in {STEPS} steps", partial(no_new_memory, settings))
    for dtype in (torch.float32, torch.bfloat16):
        checks.check(f"caches that grow lie where they did, {dtype}", partial(caches_stay, settings, dtype))
    checks.check("the budget as the allocator's limit", partial(guarded, settings))
    teardowns = TEARDOWNS if settings.cuda else 4
    checks.check(f"{teardowns} teardowns", partial(torn_down, settings, teardowns))
    finish_within_budgets(checks)


def no_new_memory(settings: Settings) -> dict[str, Any]:
    """Decode steps of one length: held bytes are level and, on CUDA, the driver is asked for nothing."""
    model = small_model("llama")
    with Watched() as watched:
        compile_small(model, settings, share=0.5, split=0.25, issue_ahead=True)
        token = prompts(1)[:, :1]
        with torch.no_grad():
            for _ in range(WARM_UP):
                model(token, use_cache=False)
            before = _memory()
            for _ in range(STEPS):
                model(token, use_cache=False)
    after = _memory()
    require(before == after, f"before {before}, after {after}")
    replayed = sum(runtime.accelerator.counters.chains_replayed for runtime in live_runtimes())
    require(replayed >= STEPS or not settings.cuda, f"{replayed} chains of launches were replayed in {STEPS} steps")
    return {**watched.require_offloaded(), **after, "chains_replayed": replayed}


def caches_stay(settings: Settings, dtype: torch.dtype) -> dict[str, Any]:
    """Decode steps with a cache that grows: it stays in its memory, and on CUDA no step makes as much as one tensor.

    OPT: where heads share keys, transformers repeats them for a mask, which makes more.
    """
    model = small_model("opt", dtype)
    eager, tokens = copy.deepcopy(model), torch.randint(4, VOCABULARY, (SEQUENCES, LENGTH + GROWS))
    steps = [tokens[:, :LENGTH], *tokens[:, LENGTH:].split(1, 1)]
    caches: Any = [DynamicCache(config=model.config) for _ in range(2)]
    logits: list[list[torch.Tensor]] = [[], []]
    lay, made = [], []
    with Watched() as watched, torch.no_grad():
        compile_small(model, settings, share=2.5, split=0.25, context=LENGTH + GROWS, max_batch=SEQUENCES)
        for given in steps:
            before = _allocated()
            for one, cache, found in zip((model, eager), caches, logits, strict=True):
                found.append(one(given, past_key_values=cache).logits[:, -1])
            made.append(_most_allocated() - before)
            (runtime,) = live_runtimes()
            kept = [tensor for layer in caches[0].layers for tensor in (layer.keys, layer.values)]
            lay.append([block_of(value) for value in runtime.mirrors.returned(kept)])
    mine, eagers = (torch.stack(found).float() for found in logits)
    if dtype is torch.float32:
        require_like((eagers.argmax(-1), eagers), (mine.argmax(-1), mine))
    difference, largest = (mine - eagers).abs().max().item(), eagers.abs().max().item()
    require(difference <= _ROUNDED * largest, f"a logit differs by {difference:.3g}; the largest is {largest:.3g}")
    require(all(one == lay[0] and None not in one for one in lay), f"caches were moved: {lay}")
    most = max(made[2:])
    require(most < kept[0].nbytes, f"a step made {most} bytes, a tensor of the cache has {kept[0].nbytes}")
    return {
        **watched.require_offloaded(), "made_bytes": most, "first_step_made_bytes": made[1],
        "cache_bytes": kept[0].nbytes, "difference": difference,
    }  # fmt: skip


def _allocated() -> int:
    """Bytes of tensors on a GPU now, from which ``_most_allocated`` counts; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _most_allocated() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _memory() -> dict[str, int]:
    """What must not change while steps run."""
    accelerators = [runtime.accelerator for runtime in live_runtimes()]
    found = {f"held {i}": sum(one.counters.held_bytes.values()) for i, one in enumerate(accelerators)}
    found |= {f"pinned {i}": one.pinned_bytes for i, one in enumerate(accelerators)}
    if torch.cuda.is_available():
        stats: Any = torch.cuda.memory_stats()
        names = ("num_device_alloc", "num_device_free", "num_alloc_retries", "num_ooms", "reserved_bytes.all.current")
        found |= {name: stats.get(name, 0) for name in names}
    return found


def guarded(settings: Settings) -> dict[str, Any]:
    """The allocator may not reserve more than the budget beside what was reserved before; results stay eager's."""
    if not settings.cuda:
        raise SkipError(NEEDS_CUDA)
    model = small_model("llama")
    expected = generate(model, 1, "static")
    with Watched() as watched:
        compile_small(model, settings, share=0.5)
        require_like(expected, generate(model, 1, "static"))
        budget = max(schedule.budget_bytes for schedule in hetegen_compile.schedules())
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        allowed = budget + (2 << 20)  # what was reserved before the model, at least a block
        failed_before = torch.cuda.memory_stats()["num_ooms"]
        torch.cuda.set_per_process_memory_fraction(min(allowed / total, 1.0))
        try:
            require_like(expected, generate(model, 1, "static"))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        failed = torch.cuda.memory_stats()["num_ooms"] - failed_before
        require(not failed, f"{failed} allocations failed within {allowed} bytes, though the step was repeated")
    return {**watched.require_offloaded(host=False), "allowed_bytes": allowed}


def torn_down(settings: Settings, times: int) -> dict[str, Any]:
    """Compile, run, let go: device memory, pinned memory and threads come back each time."""
    after: list[dict[str, int]] = []
    for _ in range(times):
        model = small_model("llama")
        compile_small(model, settings, share=0.5, issue_ahead=True)
        with torch.no_grad():
            model(prompts(1), use_cache=False)
        torch._dynamo.reset()
        del model
        gc.collect()
        after.append({"runtimes": len(live_runtimes()), **_left()})
    require(after[-1]["runtimes"] == 0, f"{after[-1]['runtimes']} accelerators are still open")
    for name in ("allocated", "threads"):
        require(after[-1][name] <= after[1][name], f"{name} grew: {[one[name] for one in after]}")
    growth = after[-1]["resident"] - after[len(after) // 2]["resident"]
    return {**after[-1], "growth_of_resident_bytes_in_second_half": growth}


def _left() -> dict[str, int]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    threads = len(list(Path("/proc/self/task").iterdir()))
    cuda = torch.cuda.is_available()
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": threads,
        "allocated": torch.cuda.memory_allocated() if cuda else 0,
    }
