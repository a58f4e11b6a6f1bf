"""Stage ``mirrors``: what the host changes is seen on the device; weights that lie in files are adopted."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

import hetegen_compile
from benchmarks.children import Notebook
from benchmarks.gpu.models import (
    Watched,
    compile_small,
    finish_within_budgets,
    generate,
    prompts,
    require_like,
    small_model,
)
from benchmarks.gpu.settings import Checks, Settings, require

Change = Callable[[Any], None]


def mirrors(settings: Settings, notebook: Notebook) -> None:
    """All checks; raises ChecksFailedError at the end if one failed."""
    checks = Checks(notebook)
    changes: dict[str, Change] = {
        "load_state_dict": _load, "copy_ under no_grad": _copy, "p.data = other": _assign,
        "p.data += and refresh": _write_unseen, "new Parameter": _replace,
    }  # fmt: skip
    for name, change in changes.items():
        checks.check(name, partial(changed, change, settings))
    checks.check("cache.reset", partial(cache_reset, settings))
    checks.check("a model in a safetensors file is adopted", partial(adopted, settings))
    finish_within_budgets(checks)


def changed(change: Change, settings: Settings) -> dict[str, Any]:
    """A forward before and after weights changed in all Linears and embeddings."""
    model = small_model("llama")
    with Watched() as watched:
        compile_small(model, settings, share=0.5, split=0.25)
        before = _logits(model)
        _logits(model)  # prefetches for the next step are under way from here on
        change(model)
        after = _logits(model)
        again = _logits(model)
    expected = _eager_logits(model)
    for found in (after, again):
        require(bool(torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))), "stale")
    require(not torch.allclose(before, after, rtol=1e-2), "the change does not show in the logits")
    return watched.require_offloaded()


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(prompts(2), use_cache=False).logits
    return logits


def _eager_logits(model: Any) -> Tensor:
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits: Tensor = model(prompts(2), use_cache=False).logits
    return logits


def _other_weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.flip(0) * 0.9 for name, tensor in model.state_dict().items()}


def _load(model: Any) -> None:
    model.load_state_dict(_other_weights(model))


def _copy(model: Any) -> None:
    others = _other_weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(others[name])


def _assign(model: Any) -> None:
    others = _other_weights(model)
    for name, parameter in model.named_parameters():
        parameter.data = others[name]


def _write_unseen(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data += 0.05
    hetegen_compile.refresh(model)


def _replace(model: Any) -> None:
    others = _other_weights(model)
    for name, parameter in list(model.named_parameters()):
        parent, _, child = name.rpartition(".")
        fresh = torch.nn.Parameter(others[name], requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(parent), child, fresh)


def cache_reset(settings: Settings) -> dict[str, Any]:
    """One static cache object for two prompts, reset between them."""
    model = small_model("llama")
    expected = _two_prompts(model)
    with Watched() as watched:
        compile_small(model, settings, share=0.5, split=0.25)
        found = _two_prompts(model)
    for one, other in zip(expected, found, strict=True):
        require(torch.equal(one, other), f"{other.tolist()} are not eager's {one.tolist()}")
    return watched.require_offloaded()


def _two_prompts(model: Any) -> list[Tensor]:
    cache = StaticCache(config=model.config, max_cache_len=32)
    found = []
    for shift in (0, 7):
        prompt = prompts(1) // 2 + shift
        cache.reset()
        found.append(
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, min_new_tokens=8, do_sample=False,
                past_key_values=cache, pad_token_id=0,
            )
        )  # fmt: skip
    return found


def adopted(settings: Settings) -> dict[str, Any]:
    """``from_pretrained`` maps the file; what is streamed moves into the pinned arena."""
    with tempfile.TemporaryDirectory() as folder:
        small_model("llama").save_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        expected = generate(model, 1, "static")
        with Watched() as watched:
            compile_small(model, settings, share=0.3, split=0.25)
            require_like(expected, generate(model, 1, "static"))
    holdings = {holding.how for schedule in watched.schedules for holding in schedule.host_memory}
    require("adopted" in holdings, f"the weights' memory was {holdings or 'not asked for'}")
    return watched.require_offloaded()
