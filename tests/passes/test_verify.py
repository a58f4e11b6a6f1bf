"""A valid schedule passes; with one node removed or moved it is refused by the nodes' names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from hetegen_compile import ir
from hetegen_compile.errors import BudgetError, MissingWaitError, ScheduleError, SlotInUseError
from hetegen_compile.ir import (
    PREFETCH,
    RELEASE,
    TO_ACCELERATOR,
    TO_HOST,
    WAIT,
    WAIT_ACCELERATOR,
    WAIT_HOST,
    annotate,
    info,
)
from hetegen_compile.passes.plans import LinearPlan
from hetegen_compile.passes.verify import verify
from tests.passes.graphs import Case, again, halves, quarters, scheduled, streamed
from tests.passes.test_group_segments import FUNCTIONS, A, B, C, X, static_cache, write_between

LAYERS = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
RING = 2 * 16 * 64 * 4  # two chunks of a quarter


def chain(x: Tensor) -> Tensor:
    for layer in LAYERS:
        x = layer(x).relu()
    return x


@pytest.fixture(scope="module")
def good() -> Case:
    return scheduled(chain, X, plan=quarters, ring_bytes=RING)


def check(found: Case) -> None:
    verify(found.module, found.context)


@pytest.mark.parametrize("plan", [halves, quarters])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_the_passes_make_is_valid(name: str, plan: Callable[[int], LinearPlan]) -> None:
    function, inputs = FUNCTIONS[name]
    check(scheduled(function, *inputs, plan=plan))


def test_the_good_graph_has_everything_that_is_broken_below(good: Case) -> None:
    check(good)
    assert len(good.nodes(PREFETCH)) == len(good.nodes(RELEASE)) == 6
    assert len([node for node in good.nodes(PREFETCH) if node.args[4]]) == 4
    assert len(good.nodes(TO_HOST)) == len(good.nodes(WAIT_HOST)) == 3  # the first host part reads the input itself
    assert len(good.nodes(TO_ACCELERATOR)) == 3


def bypass(wait: fx.Node) -> fx.Node:
    """Let readers of a wait read what is still on its way; returns the transfer."""
    (transfer,) = wait.all_input_nodes
    wait.replace_all_uses_with(transfer)
    return transfer


def erased(wait: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Erase a wait whose only reader then reads the transfer; returns that reader and the transfer."""
    (reader,) = wait.users
    transfer = bypass(wait)
    wait.graph.erase_node(wait)
    return reader, transfer


@pytest.mark.parametrize("i", range(9))
def test_without_a_wait(good: Case, i: int) -> None:
    found = again(good)
    waits = [*found.nodes(WAIT), *found.nodes(WAIT_ACCELERATOR)]
    assert len(waits) == 9
    reader, transfer = erased(waits[i])
    edge = rf"wait(_accelerator)?\({transfer}\) -> {reader}"
    with pytest.raises(MissingWaitError, match=rf"{reader} .*uses {transfer} .*edge: {edge}"):
        check(found)


@pytest.mark.parametrize("i", range(3))
def test_without_a_wait_of_the_host(good: Case, i: int) -> None:
    found = again(good)
    reader, transfer = erased(found.nodes(WAIT_HOST)[i])
    message = rf"{reader} .*uses {transfer} .*edge: wait_host\({transfer}\) -> {reader}"
    with pytest.raises(MissingWaitError, match=message):
        check(found)


@pytest.mark.parametrize("i", range(9))
def test_a_reader_that_goes_round_the_wait(good: Case, i: int) -> None:
    found = again(good)
    wait = [*found.nodes(WAIT), *found.nodes(WAIT_ACCELERATOR)][i]
    (reader,) = wait.users
    transfer = bypass(wait)
    with pytest.raises(MissingWaitError, match=f"{reader} .*uses {transfer} .*without a wait"):
        check(found)


def test_a_second_wait(good: Case) -> None:
    found = again(good)
    wait = found.nodes(WAIT)[0]
    with found.module.graph.inserting_after(wait):
        found.module.graph.node_copy(wait)
    with pytest.raises(ScheduleError, match=rf"{wait.args[0]} .*has 2 wait, expected one"):
        check(found)


@pytest.mark.parametrize("i", range(6))
def test_without_a_release(good: Case, i: int) -> None:
    found = again(good)
    release = found.nodes(RELEASE)[i]
    transfer = release.args[0]
    for prefetch in list(release.users):
        prefetch.update_arg(4, [token for token in prefetch.args[4] if token is not release])
    found.module.graph.erase_node(release)
    with pytest.raises(ScheduleError, match=rf"{transfer} .*has 0 release, expected one"):
        check(found)


@pytest.mark.parametrize("i", range(4))
def test_without_the_release_that_a_prefetch_waits_for(good: Case, i: int) -> None:
    found = again(good)
    prefetch = [node for node in found.nodes(PREFETCH) if node.args[4]][i]
    (release,) = prefetch.args[4]
    prefetch.update_arg(4, [])
    with pytest.raises(SlotInUseError, match=f"{prefetch} .*slot of {release.args[0]} .*edge: {release} -> {prefetch}"):
        check(found)


@pytest.mark.parametrize("i", range(6))
def test_a_release_before_its_reader(good: Case, i: int) -> None:
    found = again(good)
    release = found.nodes(RELEASE)[i]
    transfer = release.args[0]
    (wait,) = [user for user in transfer.users if user.target == WAIT]
    (reader,) = wait.users
    wait.append(release)
    message = f"{reader} .*reads the slot of {transfer} .*after {release} gave it up; .*edge: {reader} -> {release}"
    with pytest.raises(SlotInUseError, match=message):
        check(found)


def test_a_slot_beyond_the_ring(good: Case) -> None:
    found = again(good)
    prefetch = found.nodes(PREFETCH)[1]
    prefetch.update_arg(3, RING - 256)
    with pytest.raises(ScheduleError, match=rf"{prefetch.name} .*fills .* of a staging ring of {RING}"):
        check(found)
    prefetch.update_arg(3, -1)
    with pytest.raises(ScheduleError, match=rf"{prefetch.name} .*fills bytes -1"):
        check(found)


def test_a_slot_on_top_of_another_one(good: Case) -> None:
    found = again(good)
    first, second = found.nodes(PREFETCH)[:2]
    second.update_arg(3, int(first.args[3]) + 256)
    with pytest.raises(SlotInUseError, match=f"{second} .*overwrites the slot of {first} .*before it is released"):
        check(found)


# ---- sides ----------------------------------------------------------------------------------------------------


def test_a_host_part_that_reads_an_accelerator_value(good: Case) -> None:
    found = again(good)
    host = found.nodes(ir.HOST_LINEAR)[1]
    on_accelerator = host.args[0].args[0].args[0].args[0][0]
    host.update_arg(0, on_accelerator)
    with pytest.raises(MissingWaitError, match=f"{host.name} .* reads {on_accelerator}.* on the host, but"):
        check(found)


def test_an_accelerator_part_that_reads_a_weight_of_the_host(good: Case) -> None:
    found = again(good)
    part = found.nodes(ir.PARTIAL_LINEAR)[0]
    weight = found.nodes(PREFETCH)[0].args[0]
    part.update_arg(1, weight)
    with pytest.raises(MissingWaitError, match=f"{part.name} .* reads {weight} .*on the accelerator, but"):
        check(found)


def test_a_join_that_reads_a_host_part(good: Case) -> None:
    found = again(good)
    join, host = found.nodes(ir.JOIN)[0], found.nodes(ir.HOST_LINEAR)[0]
    join.update_arg(0, [host, *join.args[0][1:]])
    with pytest.raises(MissingWaitError, match=f"{join.name} .* reads {host} .*on the accelerator"):
        check(found)


def test_an_output_that_is_still_on_the_accelerator(good: Case) -> None:
    found = again(good)
    output = next(iter(reversed(found.module.graph.nodes)))
    (join,) = [node for node in found.nodes(TO_HOST)[-1].args[0]]
    output.args = ((join,),)
    with pytest.raises(MissingWaitError, match=f"output .*reads {join}.* on the host"):
        check(found)


# ---- downloads and writes ---------------------------------------------------------------------------------------


def test_a_write_into_what_is_still_being_copied_down() -> None:
    def function(x: Tensor) -> Any:
        y = A(x)
        z = B(y)
        y.add_(1)
        return z

    found = scheduled(function, X, plan=halves)
    check(found)
    (write,) = [n for n in found.module.graph.find_nodes(op="call_module") if info(n).writes]
    (transfer,) = [n for n in found.nodes(TO_HOST) if info(n.args[0][0]).storages & info(write).writes]
    transfer.append(write)
    message = f"{write} writes what {transfer} .*is still copying; .*edge: a wait for {transfer}"
    with pytest.raises(MissingWaitError, match=message):
        check(found)


def test_a_read_that_overtakes_the_write_before_it() -> None:
    found = scheduled(static_cache, X, torch.tensor([2]), torch.randn(6, 64), plan=streamed)
    (write,) = found.module.graph.find_nodes(op="call_module")
    (reader,) = [n for n in found.nodes(ir.PARTIAL_LINEAR) if info(n.args[0]).storages & info(write).writes]
    for operand in (reader.args[1].args[0], reader.args[1], reader):
        write.prepend(operand)
    with pytest.raises(ScheduleError, match=f"{reader} .*misses the write of .* before it in the program"):
        check(found)


def test_a_write_that_overtakes_the_read_before_it() -> None:
    found = scheduled(write_between, X, plan=streamed)
    check(found)
    (write,) = [n for n in found.module.graph.find_nodes(op="call_module") if info(n).writes]
    reader = next(n for n in found.nodes(ir.PARTIAL_LINEAR) if info(n.args[0]).storages & info(write).writes)
    reader.prepend(write)
    with pytest.raises(ScheduleError, match=f"{reader} .*shows the write of add_, .*edge: {reader} -> {write}"):
        check(found)


def test_two_writes_in_the_wrong_order() -> None:
    def function(x: Tensor) -> Any:
        y = A(x)
        y.add_(1)
        z = B(y)
        y.mul_(2)
        return C(y) + z

    found = scheduled(function, X, plan=streamed)
    check(found)
    first, second = (n for n in found.module.graph.find_nodes(op="call_module") if info(n).writes)
    second.append(first)
    with pytest.raises(ScheduleError, match="misses the write of add_ .*before it in the program"):
        check(found)


def test_a_host_write_that_overtakes_the_hosts_read_before_it() -> None:
    def function(ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        old = ids.clone()
        ids.add_(1)
        return A(x), old

    found = scheduled(function, torch.tensor([2]), X, plan=halves)
    check(found)
    (read,) = [n for n in found.module.graph.nodes if n.target == "clone"]
    (write,) = [n for n in found.module.graph.nodes if n.target == "add_"]
    write.append(read)
    with pytest.raises(ScheduleError, match=f"{read} touches l_ids_, .*edge: {read} -> {write}"):
        check(found)


# ---- at return -----------------------------------------------------------------------------------------------------


def test_an_input_that_is_not_written() -> None:
    found = scheduled(static_cache, X, torch.tensor([2]), torch.randn(6, 64), plan=halves)
    check(found)
    (write,) = [n for n in found.module.graph.nodes if n.target == "index_copy_"]
    write.replace_all_uses_with(write.args[0])
    found.module.graph.erase_node(write)
    with pytest.raises(ScheduleError, match="at return l_cache_ misses the write of index_copy_"):
        check(found)


def test_an_input_that_is_not_written_back() -> None:
    function, inputs = FUNCTIONS["computed write"]
    found = scheduled(function, *inputs, plan=halves)
    (write,) = found.nodes(ir.WRITE_BACK)
    found.module.graph.erase_node(write)
    with pytest.raises(ScheduleError, match="at return l_x_ misses the write of mul_"):
        check(found)


def test_a_mirror_that_missed_the_hosts_write() -> None:
    function, inputs = FUNCTIONS["computed write"]
    found = scheduled(function, *inputs, plan=halves)
    (segment,) = [n for n in found.module.graph.find_nodes(op="call_module") if info(n).writes]
    found.module.graph.erase_node(segment)
    with pytest.raises(ScheduleError, match=r"misses the write of mul_ .*missing edge: mul_ "):
        check(found)


def test_a_twin_of_something_else() -> None:
    function, inputs = FUNCTIONS["grown cache"]
    found = scheduled(function, *inputs, plan=halves)
    (twin,) = found.nodes(ir.TWIN)
    twin.update_arg(1, found.nodes(ir.MIRROR)[0])
    with pytest.raises(ScheduleError, match=f"{twin.name} keeps .* as the mirror of .*, but the two differ"):
        check(found)


def test_an_output_that_shares_memory_with_an_input() -> None:
    found = scheduled(chain, X, plan=halves)
    output = next(iter(reversed(found.module.graph.nodes)))
    x = next(n for n in found.module.graph.find_nodes(op="placeholder") if "x" in n.name)
    output.args = ((x,),)
    with pytest.raises(ScheduleError, match=f"the output {x} .*is not what the program returns there"):
        check(found)


def test_two_outputs_that_share_memory_as_the_program_does_not() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = A(x)
        return y, B(y)

    found = scheduled(function, X, plan=halves)
    check(found)
    output = next(iter(reversed(found.module.graph.nodes)))
    first, _ = output.args[0]
    output.args = ((first, first),)
    with pytest.raises(ScheduleError, match="is not what the program returns there"):
        check(found)


# ---- the budget and what is lent -------------------------------------------------------------------------------------


def test_a_schedule_that_needs_more_than_the_budget(good: Case) -> None:
    found = again(good)
    floor = RING + 3 * 16 * 64 * 4  # the ring and three resident quarters
    found.context = replace(found.context, budget_bytes=floor + 4096)
    check(found)
    found.context = replace(found.context, budget_bytes=floor)
    with pytest.raises(BudgetError, match=r"verify: at .* are alive on the accelerator beside a ring of 8.00 KiB"):
        check(found)


def test_an_activation_buffer_that_is_reused_while_it_is_lent(good: Case) -> None:
    found = again(good)
    up = found.nodes(TO_ACCELERATOR)[0]
    with found.module.graph.inserting_after(up.next):
        write = found.module.graph.call_method("zero_", (up.args[0][0],))
    key = 1 << 40
    annotate(up.args[0][0], storages=frozenset({key}))
    annotate(write, side="host", writes=frozenset({key}), position=10**6)
    with pytest.raises(MissingWaitError, match=f"{write.name} writes what {up.name} .*lent to the accelerator"):
        check(found)


def test_a_wait_for_what_never_started(good: Case) -> None:
    found = again(good)
    wait = found.nodes(WAIT)[0]
    with found.module.graph.inserting_before(wait):
        other = found.module.graph.call_function(WAIT, (found.nodes(ir.RESIDENT)[0],))
    with pytest.raises(ScheduleError, match=f"{other.name} waits for resident.*, which records no event of that kind"):
        check(found)
