"""What tests of the floor share: plans of small models, graphs of a few Linears, their bounds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.schedule_quality import Work
from hetegen_compile.cost_model import load_profile
from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.choose_splits import choose_splits
from hetegen_compile.passes.context import require
from hetegen_compile.planning.floor import Floor, floor
from hetegen_compile.planning.planned import BucketPlan
from tests.benchmarks.shapes import config
from tests.passes.graphs import Case, planned, streamed

LAYERS = nn.ModuleList([nn.Linear(1024, 1024, bias=False) for _ in range(4)])


@cache
def work(model_type: str) -> Work:
    return Work(config(model_type, layers=2), "decode-1")


@cache
def plan(model_type: str, hardware: str) -> BucketPlan:
    name, _, more = hardware.partition(", ")
    profile = load_profile(name)
    issuing: dict[str, Any] = {"issue_s": 4e-5, "segment_issue_s": 8e-5} if more == "issuing is dear" else {}
    link = replace(profile.link, contention=0.6 if more == "the host slows the link" else 1.0)
    if more == "with gates":
        issuing["gate_s"] = 4e-6
    accelerator = replace(profile.accelerator, **issuing)
    return work(model_type).base(replace(profile, accelerator=accelerator, link=link), 0.4)


def with_residency(base: BucketPlan, kept: list[float], ring_share: float) -> BucketPlan:
    """The plan with these shares of the weights' last rows resident, and a part of its staging ring."""
    residency = require(base.context.residency, "choose_residency")
    weights: dict[str, int] = {}
    for i, node in enumerate(base.module.graph.find_nodes(op="call_function", target=LINEAR)):
        rows = int(info(node.args[1]).value.shape[0])
        first = rows - int(kept[i % len(kept)] * rows) // 64 * 64
        weights |= {node.args[1].name: first} if first < rows else {}
    ring = int(residency.ring_bytes * ring_share) // 256 * 256
    residency = replace(residency, weights=weights, ring_bytes=ring, chunk_bytes=ring // 2 // 256 * 256)
    context = replace(base.context, residency=residency)
    return replace(base, context=replace(context, splits=choose_splits(base.module, context)))


def not_pairable(x: Tensor) -> Any:
    """Each Linear needs all of the one before."""
    for layer in LAYERS:
        x = layer(x).softmax(-1)
    return x


def bounds(function: object, case: Case | None = None) -> Floor:
    found = case or planned(function, torch.zeros(1, 1024), plan=streamed)  # type: ignore[arg-type]
    return floor(found.module, found.context)
