"""Host work that only completes the results: early enough to be hidden, never in front of what a step waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from hetegen_compile.ir import HOST_LINEAR, TO_HOST, TWIN, WAIT_HOST, info
from hetegen_compile.passes.insert_transfers import LARGE_DOWNLOAD_BYTES
from hetegen_compile.passes.plans import LinearPlan
from hetegen_compile.passes.predict_step import predict_step
from tests.passes.graphs import Case, assert_equal_to_eager, halves, quarters, resident, scheduled, streamed

LAYERS = nn.ModuleList([nn.Linear(64, 64) for _ in range(18)])
X = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
PASTS = [torch.randn(512, 64, generator=torch.Generator().manual_seed(i)) for i in range(6)]
LONG_PASTS = [past.repeat(64, 1) for past in PASTS]


def growing(x: Tensor, *pasts: Tensor) -> tuple[Tensor, ...]:
    """Each layer appends to a cache that the caller gets back."""
    grown = []
    for first, key, last, past in zip(LAYERS[::3], LAYERS[1::3], LAYERS[2::3], pasts, strict=True):
        cache = torch.cat([past, key(x)])
        x = last(first(x).relu() + cache.mean(0)).relu()
        grown.append(cache)
    return (x, *grown)


def appending(found: Case) -> list[fx.Node]:
    return [node for node in found.module.graph.nodes if node.target is torch.cat and info(node).side == "host"]


def places(found: Case) -> dict[fx.Node, int]:
    return {node: place for place, node in enumerate(found.module.graph.nodes)}


@pytest.mark.parametrize(("plan", "pasts", "early"), [(halves, PASTS, 5), (streamed, LONG_PASTS, 1)])
def test_caches_are_appended_to_while_later_layers_run(
    plan: Callable[[int], LinearPlan], pasts: list[Tensor], early: int
) -> None:
    found = scheduled(growing, X, *pasts, plan=plan)
    work, place = appending(found), places(found)
    assert len(work) == len(pasts)
    last = max(place[node] for node in found.module.graph.find_nodes(op="call_module"))
    assert sum(place[node] < last for node in work) >= early


def test_what_they_need_comes_down_with_the_next_activation() -> None:
    found = scheduled(growing, X, *PASTS, plan=halves)
    parts = len(found.nodes(HOST_LINEAR)) - len(PASTS)  # of each layer two read one activation
    assert len(found.nodes(TO_HOST)) == parts  # and the first reads the input where it lies: the result takes its place


def values_of_transfers(found: Case) -> list[int]:
    return [len(node.args[0]) for node in found.nodes(TO_HOST)]


def test_a_transfer_of_its_own_is_for_work_that_takes_far_longer() -> None:
    assert values_of_transfers(scheduled(growing, X, *LONG_PASTS, plan=streamed)) == [1] * len(PASTS) + [1]


def test_less_work_waits_for_more_until_less_is_still_to_come() -> None:
    assert values_of_transfers(scheduled(growing, X, *PASTS, plan=streamed)) == [4, 2, 1]


def test_large_values_do_not_wait_for_more() -> None:
    x = torch.randn(LARGE_DOWNLOAD_BYTES // X[0].nbytes + 1, 64)
    transfers = values_of_transfers(scheduled(growing, x, *PASTS, plan=streamed))
    assert transfers == [1] * len(transfers)


def attending(x: Tensor, *pasts: Tensor) -> tuple[Tensor, ...]:
    """Values are made in front of a segment, keys behind it."""
    grown = []
    for first, key, last, past in zip(LAYERS[:6:3], LAYERS[1:6:3], LAYERS[2:6:3], pasts, strict=True):
        value = first(x)
        keys = key(x).softmax(-1)
        x = last(keys + value).softmax(-1)
        grown += [torch.cat([past, value]), torch.cat([past, keys])]
    return (x, *grown)


def test_small_values_from_before_and_behind_a_segment_come_down_together() -> None:
    pasts = LONG_PASTS[:2]
    found = scheduled(attending, X, *pasts, plan=streamed)
    assert values_of_transfers(found) == [2, 2, 1]


def test_host_parts_of_the_same_download_come_first() -> None:
    found = scheduled(growing, X, *PASTS, plan=halves)
    place = places(found)
    for node in appending(found):
        downloads = [wait for item in node.all_input_nodes for wait in _waits(item)]
        for wait in downloads:
            parts = [user for item in wait.users for user in item.users if user.target == HOST_LINEAR]
            assert all(place[part] < place[node] for part in parts)


def test_all_host_parts_of_a_block_come_first() -> None:
    """The last one reads what the host makes of the first one's result; the accelerator waits for it."""
    layers = [(nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 64)) for _ in range(4)]

    def blocks(x: Tensor, *pasts: Tensor) -> tuple[Tensor, ...]:
        grown = []
        for (key, up, down), past in zip(layers, pasts, strict=True):
            cache = torch.cat([past, key(x)])
            x = down(up(x + cache.mean(0)).relu()).softmax(-1)
            grown.append(cache)
        return (x, *grown)

    found = scheduled(blocks, X, *PASTS[:4], plan=resident, paired=0.5)
    order = [node for node in found.module.graph.nodes if node.target == HOST_LINEAR or node in appending(found)]
    parts = [node.target == HOST_LINEAR for node in order]
    assert sum(parts) == 8
    assert len(parts) == 12
    first, second = ([i for i, part in enumerate(parts) if part][k::2] for k in (0, 1))
    assert all(b == a + 1 for a, b in zip(first, second, strict=True)), "nothing between the two of a block"


def test_no_host_part_waits_for_a_later_download() -> None:
    """Attention beside an MLP that reads the same input: the MLP's host part needs that only, the cache much more."""
    layers = [(nn.Linear(64, 32), nn.Linear(64, 128), nn.Linear(32, 64), nn.Linear(128, 64)) for _ in range(4)]
    pasts = [past[:, :32].contiguous() for past in PASTS[:4]]

    def beside(x: Tensor, *pasts: Tensor) -> tuple[Tensor, ...]:
        grown = []
        for (key, wide, out, down), past in zip(layers, pasts, strict=True):
            cache = torch.cat([past, key(x).relu()])
            x = out(cache.mean(0)) + down(wide(x).relu())
            grown.append(cache)
        return (x, *grown)

    found = scheduled(beside, X, *pasts, plan=lambda rows: halves(rows) if rows == 128 else resident(rows))
    place, parts = places(found), found.nodes(HOST_LINEAR)
    work = sorted(appending(found), key=place.__getitem__)
    assert len(parts) == len(work) == 4
    assert all(place[part] < place[node] for part, node in zip(parts, work, strict=True))


def test_the_step_is_shorter_than_with_all_of_it_at_the_end() -> None:
    found = scheduled(growing, X, *PASTS, plan=halves)
    graph, seconds = found.module.graph, predict_step(found.module, found.context).step_s
    output = next(iter(reversed(graph.nodes)))
    for node in (*appending(found), *found.nodes(TWIN)):
        output.prepend(node)
    assert seconds < predict_step(found.module, found.context).step_s


@pytest.mark.parametrize("plan", [halves, quarters])
def test_numerics(plan: Callable[[int], LinearPlan]) -> None:
    found = assert_equal_to_eager(growing, X, *PASTS, plan=plan)
    assert appending(found)


def test_a_value_that_is_written_later_is_not_sent_early() -> None:
    def function(x: Tensor, past: Tensor) -> Any:
        first, key, last = LAYERS[:3]
        new = key(x)
        y = last(first(x).relu())
        new.add_(1.0)
        return y, torch.cat([past, new])

    assert_equal_to_eager(function, X, PASTS[0], plan=halves)


def _waits(node: fx.Node) -> list[fx.Node]:
    if node.target == WAIT_HOST:
        return [node]
    return [wait for operand in node.all_input_nodes for wait in _waits(operand)] if info(node).side == "host" else []


def test_a_graph_from_which_nothing_comes_down_is_scheduled() -> None:
    found = scheduled(lambda ids: (ids + 1) % 7, torch.arange(5))
    assert not found.nodes(TO_HOST)
    assert torch.equal(found.outputs()[0], torch.tensor([1, 2, 3, 4, 5]))


@pytest.mark.parametrize("backwards", [False, True])
def test_what_could_be_anywhere_may_depend_on_each_other(backwards: bool) -> None:
    """Positions that are counted on from layer to layer, of caches that are completed in whatever order."""

    def counting(x: Tensor, start: Tensor, *pasts: Tensor) -> tuple[Tensor, ...]:
        keys = []
        for layer in LAYERS[:12]:
            x = layer(x).relu()
            keys.append(x)
        position, grown = torch.arange(2) + start, []
        order = zip(pasts, keys, strict=True)
        for past, key in reversed(list(order)) if backwards else order:
            position = position + 1
            grown.append(past.index_copy(0, position, key))
        return (x, *grown)

    assert_equal_to_eager(counting, X, torch.tensor(0), *[past[:64] for past in (*PASTS, *PASTS)], plan=halves)


def test_host_work_that_meets_again_is_looked_at_once() -> None:
    """Forty times two ways lead to the same position: one by one, all ways would never come to an end."""

    def meeting(x: Tensor, start: Tensor, past: Tensor) -> tuple[Tensor, ...]:
        x = LAYERS[1](LAYERS[0](x).relu())
        position = torch.arange(2) + start
        for _ in range(40):
            position = ((position + 1) + (position + 2)) // 2
        return x, past.index_copy(0, position, x)

    assert_equal_to_eager(meeting, X, torch.tensor(0), PASTS[0], plan=halves)
