"""Graphs whose host parts are given to a worker, and what is found in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from hetegen_compile.ir import info
from hetegen_compile.passes.issue_ahead import issue_ahead
from tests.passes.graphs import PROFILE, Case, halves, scheduled

WIDTH = 64
LAYERS = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(5)])
X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))


def chain(x: Tensor) -> Tensor:
    for layer in LAYERS:
        x = layer(x).relu()
    return x


def gated(gate_s: float = 1e-5, **costs: Any) -> Any:
    """The profile of a machine whose accelerator has gates."""
    return replace(PROFILE, accelerator=replace(PROFILE.accelerator, gate_s=gate_s, **costs))


def ahead(function: Callable[..., Any] = chain, *inputs: Any, **changes: Any) -> Case:
    """Scheduled, with the host's parts given to the worker."""
    found = scheduled(function, *(inputs or (X,)), **{"plan": halves, "profile": gated(), **changes})
    found.apply(issue_ahead)
    return found


def workers(found: Case) -> list[fx.Node]:
    return [node for node in found.module.graph.nodes if info(node).ahead]


def of(found: Case, target: Any) -> list[fx.Node]:
    return [node for node in workers(found) if node.target == target]


def places(found: Case) -> dict[fx.Node, int]:
    return {node: place for place, node in enumerate(found.module.graph.nodes)}
