"""Runs of the host: which nodes they are of, what is left alone, and what dies behind them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hetegen_compile.ir import info
from hetegen_compile.operands import linear_part
from hetegen_compile.steps.host_runs import HostRun, dying_behind, host_runs
from hetegen_compile.steps.last_uses import last_uses
from tests.host_graphs import Between, Host, mlp, names_of
from tests.host_kernels.programs import native


def arguments(run: HostRun) -> list[Tensor]:
    """What the program is called with: of weights the rows."""

    def of(index: int, node: fx.Node) -> Tensor:
        value: Tensor = info(node).value
        if index not in run.rows:
            return value
        part = linear_part(run.rows[index])
        assert part.weight is node
        return value.narrow(part.axis, part.lo, part.hi - part.lo)

    return [of(index, node) for index, node in enumerate(run.given)]


def assert_computes(run: HostRun) -> None:
    """Natively, the values that its results are in eager."""
    for found, node in zip(native(run.program, *arguments(run)), run.results, strict=True):
        torch.testing.assert_close(found, info(node).value)


def test_two_parts_and_what_lies_between_are_one_run() -> None:
    (run,) = mlp().runs()
    assert names_of(run.nodes) == ["up", "act", "down"]
    assert names_of(run.given) == ["wu", "wd", "x", "bu"]
    assert {index: node.name for index, node in run.rows.items()} == {0: "up", 1: "down"}
    assert names_of(run.results) == ["down"]
    assert_computes(run)


def test_what_others_read_is_a_result() -> None:
    host = Host()
    x, weight = host.given("x", 2, 16), host.given("w", 24, 16)
    up = host.linear("up", x, weight, None, 0, 20)
    activated = host.call("act", F.silu, up)
    (run,) = host.end(host.call("later", torch.sigmoid, up), activated).runs()
    assert names_of(run.nodes) == names_of(run.results) == ["up", "act"]
    assert_computes(run)


def test_two_parts_of_one_weight_read_rows_of_their_own() -> None:
    host = Host()
    x, weight = host.given("x", 2, 16), host.given("w", 24, 16)
    parts = [host.linear(f"part{lo}", x, weight, None, lo, lo + 10) for lo in (2, 12)]
    (run,) = host.end(host.call("product", torch.mul, *parts)).runs()
    assert names_of(run.given) == ["w", "w", "x"]
    assert names_of(run.rows.values()) == ["part2", "part12"]
    assert_computes(run)


@pytest.mark.parametrize(
    ("target", "more", "kwargs", "name"),
    [
        (F.relu, (False,), {}, "relu"),
        (F.gelu, (), {"approximate": "tanh"}, "gelu_tanh"),
        (F.silu, (), {"inplace": False}, "silu"),
    ],
)
def test_a_function_keeps_its_other_arguments(
    target: Any, more: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> None:
    (run,) = mlp(lambda host, hidden: host.call("act", target, hidden, *more, kwargs=kwargs)).runs()
    step = run.program.steps[1]
    assert (step.function, step.args[1:], step.kwargs, step.pointwise) == (target, more, kwargs, name)
    assert_computes(run)
    (plain,) = run.program.plain(arguments(run))
    torch.testing.assert_close(plain, info(run.results[0]).value)


def test_functions_before_and_behind_belong_to_it() -> None:
    host = Host()
    x, weight = host.given("x", 2, 16), host.given("w", 24, 16)
    part = host.linear("part", host.call("first", torch.relu, x), weight, None, 0, 20)
    (run,) = host.end(host.call("last", operator.mul, part, part)).runs()
    assert names_of(run.nodes) == ["first", "part", "last"]
    assert_computes(run)


def on_the_accelerator(host: Host, hidden: fx.Node) -> fx.Node:
    """A value of the other side as an operand."""
    other = host.call("other", torch.sigmoid, hidden, side="accelerator")
    return host.call("act", torch.mul, hidden, other)


@pytest.mark.parametrize(
    "between",
    [
        lambda host, hidden: host.call("act", torch.relu, hidden, side="accelerator"),
        lambda host, hidden: host.call("act", torch.relu, hidden, side=None),
        lambda host, hidden: host.call("act", torch.relu, hidden, writes=frozenset({1})),
        lambda host, hidden: host.call("act", torch.relu, hidden, random=True),
        lambda host, hidden: host.call("act", F.relu, hidden, True),
        lambda host, hidden: host.call("act", F.silu, hidden, kwargs={"inplace": True}),
        lambda host, hidden: host.call("act", "relu", hidden, op="call_method"),
        lambda host, hidden: host.call("act", torch.sigmoid, hidden),
        lambda host, hidden: host.call("act", torch.mul, hidden, 2.0),
        on_the_accelerator,
    ],
    ids=["accelerator", "nowhere", "writes", "random", "inplace", "inplace=True", "method", "sigmoid", "x2", "operand"],
)
def test_what_is_no_part_of_a_run_divides_it(between: Between) -> None:
    host = mlp(between)
    assert host.names() == [["up"], ["down"]]
    assert [names_of(run.results) for run in host.runs()] == [["up"], ["down"]]
    for run in host.runs():
        assert_computes(run)


def test_what_follows_something_else_begins_a_run() -> None:
    def between(host: Host, hidden: fx.Node) -> fx.Node:
        return host.call("act", torch.relu, host.call("other", torch.sigmoid, hidden))

    assert mlp(between).names() == [["up"], ["act", "down"]]


def test_the_workers_nodes_and_the_others_are_runs_of_their_own() -> None:
    def between(host: Host, hidden: fx.Node) -> fx.Node:
        return host.call("act", torch.relu, hidden, ahead=True)

    assert mlp(ahead=True).names() == [["up", "act"], ["down"]]
    assert mlp(between, ahead=True).names() == [["up"], ["act", "down"]]
    assert mlp(between).names() == [["up"], ["down"]]


def test_without_a_part_of_our_kernels_there_is_no_run() -> None:
    host = mlp()
    assert host_runs(host.graph, {}) == []
    down = {node: kernel for node, kernel in host.linears.items() if node.name == "down"}
    (run,) = host_runs(host.graph, down)
    assert names_of(run.nodes) == ["act", "down"]
    other = Host()
    x = other.given("x", 2, 16)
    assert other.end(other.call("act", torch.relu, other.call("square", torch.mul, x, x))).names() == []


def test_what_dies_inside_dies_behind_the_run_if_it_has_a_name() -> None:
    """x and the weights die inside, ``up`` is a result and lives on, ``act`` has no name."""
    host = Host()
    x, w_up, w_down = host.given("x", 2, 16), host.given("wu", 24, 16), host.given("wd", 8, 24)
    up = host.linear("up", x, w_up, None, 0, 24)
    down = host.linear("down", host.call("act", torch.relu, up), w_down, None, 0, 8)
    later = host.call("later", torch.sigmoid, up)
    host.end(down, later)
    before = last_uses(host.graph)
    assert dying_names(before) == {"up": ["x", "wu"], "down": ["wd", "act"], "later": ["up"]}
    assert dying_names(dying_behind(before, host.runs())) == {"down": ["x", "wu", "wd"], "later": ["up"]}
    assert dying_behind(before, []) == before


def dying_names(dying: Mapping[fx.Node, list[fx.Node]]) -> dict[str, list[str]]:
    """Of all lines but the last."""
    return {node.name: names_of(dead) for node, dead in dying.items() if node.op != "output"}


def test_a_run_behind_which_nothing_dies() -> None:
    host = Host()
    x, weight = host.given("x", 2, 16), host.given("w", 24, 16)
    part = host.linear("part", x, weight, None, 0, 24)
    host.end(host.call("unread", torch.relu, part), x, weight, part)
    assert dying_names(dying_behind(last_uses(host.graph), host.runs())) == {}


def test_a_weight_may_be_read_as_a_tensor_as_well() -> None:
    host = Host()
    x, weight = host.given("x", 2, 16), host.given("w", 2, 16)
    part = host.linear("part", x, weight, None, 0, 2)
    (run,) = host.end(part, host.call("product", torch.mul, weight, x)).runs()
    assert names_of(run.given) == ["w", "x", "w"]
    assert_computes(run)
