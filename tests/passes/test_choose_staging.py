"""Which weights are asked for, what becomes of the answer, and what that does to splits and prediction."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from hetegen_compile.cost_model import SplitProblem, row_granularity, solve_split
from hetegen_compile.ir import LINEAR, PREFETCH, STAGE, info
from hetegen_compile.passes.annotate_costs import annotate_costs
from hetegen_compile.passes.choose_splits import choose_splits, with_host_rows
from hetegen_compile.passes.choose_staging import choose_staging
from hetegen_compile.passes.context import Refusal
from hetegen_compile.passes.plans import GROWTH, STAGED_CHUNK_BYTES, Residency
from hetegen_compile.passes.predict_step import predict_step
from hetegen_compile.passes.split_linears import split_linears
from hetegen_compile.planning.floor import floor_s
from tests.passes.graphs import PROFILE, Case, again, case, planned, quarters, scheduled, streamed

ROWS = 256
LAYERS = nn.ModuleList([nn.Linear(256, ROWS) for _ in range(3)])
X = torch.randn(1, 256)
BUDGET = {"activations": 0, GROWTH: 0}


def chain(x: Tensor) -> Tensor:
    for layer in LAYERS:
        x = layer(x).relu()
    return x


@dataclass
class Answer:
    """Host memory of which some weights are staged, by the order in which they are asked for."""

    reasons: tuple[str, ...]
    asked: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)

    def staged(self, names: Collection[str], weights: Mapping[str, Tensor]) -> dict[str, str]:
        """The reasons in order; "" for what is pinned."""
        self.asked, self.known = list(names), list(weights)
        return {name: reason for name, reason in zip(names, self.reasons, strict=True) if reason}


def undecided(answer: Answer | None, resident: Mapping[int, int] | None = None, whole_graph: bool = False) -> Case:
    """The chain with costs and residency: first resident row by layer."""
    found = case(chain, X).run(annotate_costs)
    weights = [node.args[1].name for node in found.nodes(LINEAR)]
    first = {weights[layer]: row for layer, row in (resident or {}).items()}
    residency = Residency(first, 1 << 20, 1 << 18, BUDGET, whole_graph=whole_graph)
    found.context = replace(found.context, residency=residency, host_memory=answer)
    return found


def test_weights_that_may_be_streamed_are_asked_for_among_all() -> None:
    answer = Answer(("", ""))
    found = undecided(answer, resident={1: 0})
    assert found.apply(choose_staging) == {}
    weights = [node.args[1].name for node in found.nodes(LINEAR)]
    assert answer.asked == [weights[0], weights[2]]
    assert set(answer.known) == set(found.context.weights) > set(weights)
    assert found.refusals == []


def test_each_reason_is_told_once() -> None:
    found = undecided(Answer(("too large", "shared", "too large")))
    names = [node.args[1].name for node in found.nodes(LINEAR)]
    modules = [info(node).module for node in found.nodes(LINEAR)]
    assert found.apply(choose_staging) == dict(zip(names, ("too large", "shared", "too large"), strict=True))
    prefix = "not pinned but streamed through the pinned ring: "
    assert found.refusals == [
        Refusal(f"{modules[0] or names[0]} and 1 more", f"{prefix}too large"),
        Refusal(modules[1] or names[1], f"{prefix}shared"),
    ]


def test_rows_resident_beside_a_forced_host_share_are_asked_for_and_not_told() -> None:
    found = undecided(Answer(("r", "r", "r")), resident=dict.fromkeys(range(3), ROWS // 2))
    found.context = replace(found.context, options=replace(found.context.options, split=0.5))
    assert len(found.apply(choose_staging)) == 3
    assert found.refusals == []


def test_rows_beside_resident_ones_are_told() -> None:
    found = undecided(Answer(("r", "r", "r")), resident=dict.fromkeys(range(3), ROWS // 2))
    assert len(found.apply(choose_staging)) == 3
    assert [refusal.where.endswith(" and 2 more") for refusal in found.refusals] == [True]


@pytest.mark.parametrize("answer", [None, Answer(())])
def test_nothing_is_asked_where_nothing_streams(answer: Answer | None) -> None:
    found = undecided(answer, whole_graph=answer is not None)
    assert found.apply(choose_staging) == {}
    assert answer is None or answer.asked == []


# ---- splits -------------------------------------------------------------------------------------------------------


def staged_names(found: Case) -> dict[str, str]:
    return dict.fromkeys((node.args[1].name for node in found.nodes(LINEAR)), "a test")


def test_a_slow_pin_thread_moves_rows_to_the_host() -> None:
    slow = replace(PROFILE, pin_bytes_per_s=PROFILE.link.up.pinned.at(1e6) / 8, fixed_s_per_split=0.0)
    base = undecided(None)
    direct = again(base, profile=slow)
    staged = again(base, profile=slow, staged=staged_names(base))
    plans = [choose_splits(one.module, one.context) for one in (direct, staged)]
    for position, plan in plans[0].items():
        cost = base.context.costs[position]  # type: ignore[index]
        problem = SplitProblem(
            rows=256,
            host_s_per_row=cost.host_s / 256,
            link_s_per_row=cost.link_s / 256,
            accelerator_s_per_row=cost.accelerator_s / 256,
            pin_s_per_row=cost.weight_bytes / 256 / slow.pin_bytes_per_s,
        )
        assert plans[1][position].host == solve_split(problem, row_granularity(256)).host_rows
        assert plans[1][position].host > plan.host


def test_chunks_of_staged_weights_keep_the_pinned_ring_small() -> None:
    wide = nn.Linear(4096, 2048)
    found = case(lambda x: wide(x), torch.empty(1, 4096)).run(annotate_costs)
    found.context = replace(found.context, residency=Residency({}, 1 << 30, 1 << 27, BUDGET))
    (node,) = found.nodes(LINEAR)
    assert len(with_host_rows(node, 0, found.context).streamed) == 1
    staged = replace(found.context, staged=staged_names(found))
    chunks = with_host_rows(node, 0, staged).streamed
    assert chunks[0][0] == 0
    assert chunks[-1][1] == 2048
    assert max((hi - lo) * 4096 * 4 for lo, hi in chunks) == STAGED_CHUNK_BYTES


# ---- the rewrite --------------------------------------------------------------------------------------------------


def test_streamed_rows_are_staged_first() -> None:
    layer = nn.Linear(8, 16, bias=False)
    found = planned(lambda x: layer(x), torch.randn(3, 8), plan=quarters)
    found.context = replace(found.context, staged=staged_names(found))
    found.apply(split_linears)
    lines = found.text.splitlines()
    weight = lines[1].partition("stage(")[2].partition(",")[0]
    assert [line.replace(weight, "w") for line in lines[1:4]] == [
        "t2 = stage(w, [4, 8], 0, -1, [])",
        "t3 = prefetch(t2, [0, 4], 0, -1, [])",
        "t4 = wait(t3)",
    ]
    assert len(found.nodes(STAGE)) == len(found.nodes(PREFETCH)) == 2


def test_weights_that_are_pinned_are_left_alone() -> None:
    found = planned(chain, X, plan=streamed)
    first, *_ = (node.args[1].name for node in found.nodes(LINEAR))
    found.context = replace(found.context, staged={first: "a test"})
    found.apply(split_linears)
    assert [node.args[0].name for node in found.nodes(STAGE)] == [first]
    assert len(found.nodes(PREFETCH)) == 3


# ---- the prediction -----------------------------------------------------------------------------------------------


def predicted_s(pin_bytes_per_s: float | None) -> float:
    profile = PROFILE if pin_bytes_per_s is None else replace(PROFILE, pin_bytes_per_s=pin_bytes_per_s)
    names = {} if pin_bytes_per_s is None else all_weights()
    found = scheduled(chain, X, plan=streamed, profile=profile, staged=names)
    prediction = predict_step(found.module, found.context)
    pin_s = 3 * 256 * 256 * 4 / profile.pin_bytes_per_s if names else 0.0
    assert prediction.busy_s.get("pin", 0.0) == pytest.approx(pin_s)
    return prediction.step_s


def all_weights() -> dict[str, str]:
    return staged_names(case(chain, X).run(annotate_costs))


def test_the_pin_thread_takes_time_beside_the_link() -> None:
    direct, fast, slow = predicted_s(None), predicted_s(1e15), predicted_s(1e6)
    assert direct < fast <= direct + 3 * PROFILE.accelerator.launch_s  # stages have to be issued
    assert slow == pytest.approx(3 * 256 * 256 * 4 / 1e6, rel=0.1)


def test_the_floor_knows_the_pin_thread() -> None:
    base = undecided(None)
    base.context = replace(base.context, splits={info(node).position: streamed(256) for node in base.nodes(LINEAR)})
    slow = replace(base.context, profile=replace(PROFILE, pin_bytes_per_s=1e6))
    staged = replace(slow, staged=staged_names(base))
    assert floor_s(base.module, slow) == floor_s(base.module, base.context)
    assert floor_s(base.module, staged) > floor_s(base.module, slow)
    fast = replace(staged, profile=replace(PROFILE, pin_bytes_per_s=1e15))
    assert floor_s(base.module, fast) == pytest.approx(floor_s(base.module, base.context))
