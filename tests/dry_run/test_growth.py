"""What a dry run does grows no faster than the depth of the model: counted, not timed."""

from __future__ import annotations

import cProfile
import pstats
from typing import Any, NamedTuple

import pytest
from transformers import OPTConfig

from hetegen_compile import plan_generation
from hetegen_compile.dry_run import generation
from hetegen_compile.dry_run.forwards import TracedGeneration, trace_generation


class Work(NamedTuple):
    """Calls of functions (built-in ones too), nodes of graphs that were made, schedules that were simulated."""

    calls: int
    nodes: int
    schedules: int


def work(layers: int, monkeypatch: pytest.MonkeyPatch) -> Work:
    """What planning a generation of a model of some layers does once it is traced; much of its weights is offloaded."""
    config = OPTConfig(
        hidden_size=256, ffn_dim=1024, num_hidden_layers=layers, num_attention_heads=4, vocab_size=512,
        word_embed_proj_dim=256, max_position_embeddings=256,
    )  # fmt: skip
    profile = cProfile.Profile()

    def trace(*args: Any, **kwargs: Any) -> TracedGeneration:
        traced = trace_generation(*args, **kwargs)
        profile.enable()
        return traced

    monkeypatch.setattr(generation, "trace_generation", trace)
    # a little more than 1 MiB: with less or more other kinds of splits are tried at six layers than at four
    options = {"hardware": "a10-xeon", "gpu_memory": (65 << 14) + layers * (3 << 18)}
    plan = plan_generation(config, prompt=16, new_tokens=4, options=options)
    profile.disable()
    assert plan.decode is not None
    assert plan.decode.streamed_bytes + plan.decode.host_bytes > plan.decode.resident_bytes / 4
    found: Any = pstats.Stats(profile)
    count = {"create_node": 0, "simulate": 0}
    for (_, _, name), row in found.stats.items():
        if name in count:
            count[name] += row[1]
    return Work(found.total_calls, count["create_node"], count["simulate"])


def test_work_grows_no_faster_than_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    work(1, monkeypatch)  # imports and caches
    two, four, six = (work(layers, monkeypatch) for layers in (2, 4, 6))
    assert 0 < six.nodes - four.nodes <= 1.1 * (four.nodes - two.nodes)
    assert 0 < six.calls - four.calls <= 1.1 * (four.calls - two.calls)
    assert max(two.schedules, four.schedules, six.schedules) <= 60  # whatever the depth
