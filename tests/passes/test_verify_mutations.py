"""The verifier against mutants of valid schedules, and the mutants that it lets pass against hostile timing.

Each schedule is changed in every single way that ``mutants`` knows. What the verifier refuses is counted by kind;
what it lets pass is run on the emulated accelerator, two steps with random delays, and must give eager's results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers grouped_mm_fallback)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hetegen_compile.accelerators import EmulatedAccelerator
from hetegen_compile.errors import ScheduleError
from hetegen_compile.ir import PAD, PARTIAL_GROUPED, TO_ACCELERATOR
from hetegen_compile.passes.plans import LinearPlan
from hetegen_compile.passes.verify import verify
from tests.passes.graphs import halves, quarters, resident, scheduled
from tests.passes.mutants import STEPS, Mutant, mutants, run_emulated

torch.manual_seed(0)
STACK = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
Q, K, V, OUT = (nn.Linear(64, 64) for _ in range(4))
TABLE = nn.Embedding(64, 64)
CONV = nn.ModuleList([Conv1D(64, 64) for _ in range(2)])
QUARTER = 16 * 64 * 4


def stack(x: Tensor) -> Tensor:
    """Linears in a row."""
    for layer in STACK:
        x = layer(x).relu()
    return x


def attention(x: Tensor, at: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """One token of attention with a static cache that is written in place, and one that grows."""
    q = Q(x).view(1, 4, 1, 16)
    keys.index_copy_(2, at, K(x).view(1, 4, 1, 16))
    grown = torch.cat([values, V(x).view(1, 4, 1, 16)], dim=2)
    mixed = F.scaled_dot_product_attention(q, keys, grown)
    return OUT(mixed.reshape(1, 64)), grown


def tied(ids: Tensor) -> Tensor:
    """An embedding table that is the last Linear's weight, too."""
    return F.linear(STACK[0](TABLE(ids)).relu(), TABLE.weight)


def in_place(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Writes between readers, a computed write to one input and a counter in another."""
    a = Q(x)
    b = K(a)
    a.add_(1)
    y.mul_(2)
    c = V(a) + b
    a.mul_(0.5)
    return OUT(a) + c, a


def conv1d(x: Tensor) -> Tensor:
    """GPT-2's Linears, whose parts are partial sums."""
    for layer in CONV:
        x = layer(x).tanh()
    return x


def block(x: Tensor) -> Any:
    """Linears that are cut as one, and one behind them."""
    return OUT(V(F.silu(Q(x)) * K(x)) + x)


UP, DOWN = (nn.Parameter(torch.randn(8, 32, 64) / 8) for _ in range(2))


def experts(x: Tensor, ends: Tensor) -> Tensor:
    """Products with experts, of which the host has a quarter; the others are streamed, two at a time."""
    made = torch.ops.transformers.grouped_mm_fallback(Q(x), UP.transpose(1, 2), offs=ends)
    found: Tensor = OUT(torch.ops.transformers.grouped_mm_fallback(made.relu(), DOWN, offs=ends))
    return found


def expert_quarters(groups: int) -> LinearPlan:
    """A quarter on the host, and one in each of three parts that are streamed."""
    step = groups // 4
    return LinearPlan(groups, step, tuple((lo, lo + step) for lo in range(step, groups, step)), None)


X = torch.randn(1, 64)
ENDS = torch.tensor([0, 2, 3, 3, 7, 9, 9, 12], dtype=torch.int32)
CACHES = torch.randn(1, 4, 6, 16), torch.randn(1, 4, 5, 16)
GRAPHS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], Callable[[int], LinearPlan], int]] = {
    "stack": (stack, (X,), quarters, 2 * QUARTER),
    "attention": (attention, (X, torch.tensor([2]), *CACHES), halves, 5 * QUARTER),
    "tied": (tied, (torch.tensor([3]),), quarters, 3 * QUARTER),
    "in place": (in_place, (X, torch.randn(3)), halves, 4 * QUARTER),
    "conv1d": (conv1d, (X,), quarters, 2 * QUARTER),
    "block": (block, (X,), halves, 4 * QUARTER),
    "experts": (experts, (torch.randn(12, 64), ENDS), resident, 4 * 32 * 64 * 4),
}  # fmt: skip

NEVER_HARMLESS = (
    "remove wait", "bypass wait", "read the source", "wait twice", "remove release", "drop token", "return an input"
)  # fmt: skip
SOMETIMES_HARMLESS = ("move up", "move down")
"""Moves: into a race or past a write the verifier refuses them, elsewhere they only change the timing."""


def eager_steps(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of ``STEPS`` calls on the same tensors, and these tensors afterwards."""
    own = [x.clone() for x in inputs]
    outputs: list[Tensor] = []
    with torch.no_grad():
        for _ in range(STEPS):
            result = function(*own)
            outputs += [x.clone() for x in (result if isinstance(result, tuple) else (result,))]
    return outputs, own


def assert_runs_like_eager(mutant: Mutant, function: Callable[..., Any], inputs: tuple[Tensor, ...], seed: int) -> None:
    expected, written = eager_steps(function, inputs)
    fresh = {id(x): x.clone() for x in inputs}
    given = [fresh.get(id(value), value) for value in mutant.case.inputs]
    accelerator = EmulatedAccelerator(1 << 26, seed=seed)
    try:
        actual = run_emulated(mutant.case, given, accelerator)
    finally:
        accelerator.close()
    torch.testing.assert_close(actual, expected, msg=lambda text: f"{mutant.kind} {mutant.node}: {text}")
    torch.testing.assert_close(list(fresh.values()), written, msg=lambda text: f"{mutant.kind} {mutant.node}: {text}")


@dataclass(frozen=True)
class Verdicts:
    """What the verifier said of all mutants of one graph."""

    graph: str
    passed: list[Mutant]
    messages: list[str]
    caught: Counter[str]
    kept: Counter[str]
    shared: int = 0
    """The most values that go up in one transfer."""


@pytest.fixture(scope="module", params=GRAPHS)
def verdicts(request: pytest.FixtureRequest) -> Verdicts:
    """A graph's mutants, judged; any other error than one of the schedule fails."""
    function, inputs, plan, ring = GRAPHS[request.param]
    base = scheduled(
        function, *inputs, plan=plan, ring_bytes=ring, paired=0.5 if request.param == "block" else 0.0,
        experts=expert_quarters if request.param == "experts" else None,
    )  # fmt: skip
    verify(base.module, base.context)
    most = max(len(up.args[0]) for up in base.nodes(TO_ACCELERATOR))
    found = Verdicts(request.param, [], [], Counter(), Counter(), most)
    for mutant in mutants(base):
        try:
            verify(mutant.case.module, mutant.case.context)
        except ScheduleError as error:
            found.caught[mutant.kind] += 1
            found.messages.append(str(error))
        else:
            found.kept[mutant.kind] += 1
            found.passed.append(mutant)
    print(f"{found.graph}: caught {dict(found.caught)}, let pass {dict(found.kept)}")
    return found


def test_every_lost_order_is_found(verdicts: Verdicts) -> None:
    for kind in NEVER_HARMLESS:
        assert verdicts.kept[kind] == 0, kind
    for kind in ("remove wait", "bypass wait", "read the source", "wait twice", "remove release", "drop token"):
        assert verdicts.caught[kind] > 0, f"no {kind} was tried"
    assert verdicts.caught["shift slot"] >= 10
    for kind in SOMETIMES_HARMLESS:
        assert verdicts.caught[kind] >= 5
        assert verdicts.kept[kind] >= 20
    assert verdicts.caught.total() >= 70
    assert all(text.startswith("verify: ") for text in verdicts.messages)
    if verdicts.graph == "experts":
        assert any(mutant.case.nodes(PARTIAL_GROUPED) for mutant in verdicts.passed)
        assert any("grouped" in text for text in verdicts.messages)
    if verdicts.graph == "attention":
        assert verdicts.shared == 3, "q, k and v share a transfer, so its wait was lost as well"
    named = sum("missing edge: " in text for text in verdicts.messages)
    assert named >= 0.8 * len(verdicts.messages), "a second wait or release has no edge that is missing"


def test_what_is_let_pass_is_right_under_any_timing(verdicts: Verdicts) -> None:
    function, inputs, _, _ = GRAPHS[verdicts.graph]
    assert len(verdicts.passed) >= 50
    for seed, mutant in enumerate(verdicts.passed):
        assert_runs_like_eager(mutant, function, inputs, seed)


def test_a_lost_effect_is_found_unless_it_only_saves_an_upload(verdicts: Verdicts) -> None:
    lost = [mutant for mutant in verdicts.passed if mutant.kind == "drop effect"]
    assert all("twin" in mutant.node for mutant in lost)
    if verdicts.graph == "block":
        assert any(mutant.case.nodes(PAD) for mutant in verdicts.passed), "the block was not cut as one"
    if verdicts.graph in ("attention", "in place"):
        assert verdicts.caught["drop effect"] > 0
