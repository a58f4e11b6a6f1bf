"""The verifier and the worker: what each thread waits for, writes and leaves."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from hetegen_compile import ir
from hetegen_compile.errors import MissingWaitError, ScheduleError
from hetegen_compile.ir import annotate, info
from hetegen_compile.passes.verify import verify
from tests.passes.worker import ahead, of, places


def test_what_the_host_takes_from_the_worker_without_waiting_is_found() -> None:
    found = ahead()
    part = of(found, ir.HOST_LINEAR)[-1]
    with found.module.graph.inserting_after(of(found, ir.TO_ACCELERATOR)[-1]):
        stolen = annotate(found.module.graph.call_function(torch.neg, (part,)), info(part), ahead=False)
    annotate(stolen, storages=frozenset({10**6}))
    with pytest.raises(MissingWaitError, match=rf"on host reads what {part.name} .* on worker may"):
        found.apply(verify)


def test_what_was_caught_up_with_may_be_taken() -> None:
    found = ahead()
    graph = found.module.graph
    caught = found.nodes(ir.CAUGHT_UP)[0]
    (sent,) = caught.all_input_nodes
    (part,) = sent.all_input_nodes
    with graph.inserting_after(caught):
        taken = annotate(graph.call_function(torch.neg, (part,)), info(part), ahead=False)
    annotate(taken, storages=frozenset({10**6}))
    found.apply(verify)


def test_a_transfer_that_nothing_waits_for_is_found() -> None:
    found = ahead()
    wait = next(node for node in found.nodes(ir.WAIT_ACCELERATOR) if info(node.args[0]).ahead)
    for item in list(wait.users):
        item.replace_input_with(wait, wait.args[0])
    found.module.graph.erase_node(wait)
    with pytest.raises(MissingWaitError):
        found.apply(verify)


def test_two_waits_of_one_thread_are_found() -> None:
    found = ahead()
    (download, *_) = found.nodes(ir.TO_HOST)
    (wait,) = [user for user in download.users if info(user).ahead]
    with found.module.graph.inserting_after(wait):
        annotate(ir.call(found.module.graph, ir.WAIT_HOST, (download,)), info(wait))
    with pytest.raises(ScheduleError, match="has 2 wait_host"):
        found.apply(verify)


def test_what_a_download_reads_is_not_written_before_the_worker_has_it() -> None:
    """A write between the worker's wait and the gate: the issuing thread's order alone does not order it."""
    found = ahead()
    graph = found.module.graph
    wait = of(found, ir.WAIT_HOST)[1]
    (download,) = wait.all_input_nodes
    (source,) = download.all_input_nodes
    (key,) = info(source).storages
    last = next(node for node in of(found, ir.TO_ACCELERATOR) if places(found)[node] > places(found)[wait])
    inner = fx.Graph()
    x = annotate(inner.placeholder("x"), info(source))
    added = annotate(inner.call_method("add_", (x, 1)), info(source), writes=frozenset({key}), position=10**6)
    inner.output((added,))
    found.module.add_submodule("segment_that_writes", fx.GraphModule({}, inner))
    with graph.inserting_after(last):
        write = graph.call_module("segment_that_writes", (source,))
    annotate(write, info(source), value=(info(source).value,), writes=frozenset({key}))
    with pytest.raises(MissingWaitError, match=rf"writes what {download.name} .*on down is still copying"):
        found.apply(verify)
