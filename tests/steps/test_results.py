"""What Dynamo reads of results beside their values: which sizes vary, what is a view."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hetegen_compile.steps.results import NOTE, Results
from tests.backend.modules import WIDTH
from tests.models.harness import RecordingBackend, emulated
from tests.passes.graphs import Case, case

TOKENS = 5


def _kinds_of_results(x: Tensor) -> tuple[Tensor, ...]:
    """A cache of all tokens, a window of it, and neither."""
    cache = x * 2
    return cache, cache[:, :, -3:], cache.sum(-1), cache[:, :, -TOKENS:]


def test_a_prefill_says_which_results_grow_and_which_are_views() -> None:
    found: Case = case(_kinds_of_results, torch.randn(1, 2, TOKENS, 4))
    results = Results.of(found.module, TOKENS)
    assert results.varying == {0: {2}, 3: {2}}
    assert results.views == (1, 3)


def test_views_of_each_layer_are_views() -> None:
    found = case(
        lambda x, y: tuple(view for one in (x, y) for view in (one.t(), one[1:], one.relu())), *torch.randn(2, 4, 4)
    )
    assert Results.of(found.module, 0).views == (0, 1, 3, 4)


def test_a_graph_whose_tokens_are_not_fixed_leaves_it_to_dynamo() -> None:
    found: Case = case(_kinds_of_results, torch.randn(1, 2, TOKENS, 4), dynamic=True)
    assert Results.of(found.module, 0).varying == {}


def test_copies_become_views_and_views_stay() -> None:
    copy, whole = torch.randn(2, 3), torch.randn(4)
    view = whole[1:]
    first, second, third = Results(varying={2: frozenset({0})}, views=(0, 1)).as_eager((copy, view, whole))
    assert first._base is copy
    assert second is view
    assert third is whole
    assert getattr(third, NOTE) == {0}
    assert not hasattr(first, NOTE)


class Grows(nn.Module):
    """A cache of the shape that attention has, which ``forward`` makes or lengthens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor, cache: Tensor | None = None) -> Tensor:
        new = self.inner(ids[..., None].expand(*ids.shape, WIDTH) / WIDTH).view(*ids.shape, 2, -1).transpose(1, 2)
        return new.contiguous() if cache is None else torch.cat([cache, new], 2)


def test_one_graph_serves_all_steps_after_a_prefill() -> None:
    torch.manual_seed(0)
    model, backend = Grows().eval(), RecordingBackend()
    ids = torch.arange(TOKENS + 3)[None]

    def run(forward: Any) -> Tensor:
        cache: Tensor = forward(ids[:, :TOKENS])
        for token in range(TOKENS, TOKENS + 3):
            cache = forward(ids[:, token : token + 1], cache)
        return cache

    with torch.no_grad():
        expected = run(model.forward)
        model.compile(backend=backend, options=emulated(gpu_memory=64 << 10))
        found = run(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(backend.graphs) == 2, "a prefill and its decode"
    assert all(plan.schedule.host_bytes for graph in backend.graphs for plan in graph.plans)
