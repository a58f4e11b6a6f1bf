"""The end of a step starts the prefetches that the start of the next step needs.

Why: between the last prefetch of a step and the first of the next one the link would idle, and the first Linears
would wait for their rows. Offsets in the ring are static, so the slots at the start of a step are the same in
every step: as soon as their last readers of this step are through, the next step's rows can go there.

The prefetches at the start of a step (those that overwrite nothing of their own step and are issued before any large
result of the host's goes up) become ``carried``: the transfer that the step before has started, or a prefetch if there
is none that is still valid. Their copies for the next step follow everything else that this step sends up, so they hold
up nothing of it.

Before (a ring of two slots):                         After:

    t1 = prefetch(w1, ..., 0, [])                         t1 = carried(w1, ..., 0)
    t2 = prefetch(w2, ..., 4096, [])                      t2 = carried(w2, ..., 4096)
    s1 = partial_linear(x, wait(t1), ...)                 s1 = partial_linear(x, wait(t1), ...)
    r1 = release(t1)                                      r1 = release(t1)
    t3 = prefetch(w3, ..., 0, [r1])                       t3 = prefetch(w3, ..., 0, [r1])
    s2 = partial_linear(s1, wait(t2), ...)                s2 = partial_linear(s1, wait(t2), ...)
    r2 = release(t2)                                      r2 = release(t2)
    s3 = partial_linear(s2, wait(t3), ...)                s3 = partial_linear(s2, wait(t3), ...)
    r3 = release(t3)                                      r3 = release(t3)
    ...                                                   prefetch_ahead(w1, ..., 0, [r3])
                                                          prefetch_ahead(w2, ..., 4096, [r2])
                                                          ...

Nothing changes in a graph that streams no weights (all of them resident or on the host), nor where some go through
the pinned ring: the pin thread issues their uploads, so the order of the link's queue is not that of the graph. A
weight that the graph itself writes is never streamed; one that is written between two steps is found out of date
when the step begins.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from hetegen_compile import ir
from hetegen_compile.ir import annotate, info
from hetegen_compile.passes.context import Context, Refusal
from hetegen_compile.passes.hold_prefetches import large_results, large_uploads
from hetegen_compile.passes.node_work import node_work
from hetegen_compile.passes.predict_step import predict_step
from hetegen_compile.passes.schedule import first_lap, release_of, slot_bytes

_STAGED = "none: weights go through the pinned ring, whose thread issues the uploads when it gets there"


def carry_prefetches(module: fx.GraphModule, context: Context) -> None:
    """Turn the prefetches at the start of the step into carried ones, and start them again at its end."""
    graph = module.graph
    if graph.find_nodes(op="call_function", target=ir.STAGE):
        context.refuse(Refusal("prefetches for the next step", _STAGED))
        return
    carried = [_carry(graph, prefetch) for prefetch in _begun_with(module, context)]
    if not carried:
        return
    place = {node: position for position, node in enumerate(graph.nodes)}
    behind = max(_sent_up(graph, context), key=place.__getitem__)
    for node, releases in zip(carried, _last_releases(graph, carried), strict=True):
        after = max([behind, *releases], key=place.__getitem__)
        behind = _start_again(graph, node, releases, after)
        place[behind] = place[after]


def _begun_with(module: fx.GraphModule, context: Context) -> list[fx.Node]:
    """The prefetches of the first lap that are started a step early.

    These are the ones issued before the first large result of the host's parts: later ones would hold it up on the
    link. Of those behind any other large upload, only as many as the link has time for before it is made.
    """
    nodes = list(module.graph.nodes)
    place = {node: position for position, node in enumerate(nodes)}
    results = large_results(nodes, context)
    first = min((place[node] for node in results), default=len(place))
    lap = [prefetch for prefetch in first_lap(module.graph) if place[prefetch] < first]
    uploads = [node for node in large_uploads(nodes, context) if lap and place[node] < place[lap[-1]]]
    if not uploads:
        return lap
    found, idle_s = [], _idle_s(module, uploads[0], context)
    for prefetch in lap:
        seconds = node_work(prefetch, context).seconds
        if place[prefetch] > place[uploads[0]] and idle_s < seconds / 2:
            break
        idle_s -= seconds
        found.append(prefetch)
    return found


def _idle_s(module: fx.GraphModule, upload: fx.Node, context: Context) -> float:
    """Seconds that the link idles at the end of a step, and until an upload is made at the start of the next one."""
    prediction = predict_step(module, context)
    link_s = max(prediction.end_s[node] for node, work in prediction.work.items() if work.resource == "up")
    return prediction.step_s - link_s + max(prediction.end_s[made] for made in upload.all_input_nodes)


def _carry(graph: fx.Graph, prefetch: fx.Node) -> fx.Node:
    """The prefetch as a carried one."""
    with graph.inserting_before(prefetch):
        carried = annotate(ir.call(graph, ir.CARRIED, prefetch.args[:4]), info(prefetch))
    prefetch.replace_all_uses_with(carried)
    graph.erase_node(prefetch)
    return carried


def _start_again(graph: fx.Graph, carried: fx.Node, releases: list[fx.Node], after: fx.Node) -> fx.Node:
    """The copy for the next step, issued behind ``after``."""
    with graph.inserting_after(after):
        ahead = ir.call(graph, ir.PREFETCH_AHEAD, (*carried.args, releases))
    return annotate(ahead, info(carried))


def _sent_up(graph: fx.Graph, context: Context) -> list[fx.Node]:
    """What this step queues on the link: a copy for the next step that came before would hold it up."""
    return [*large_uploads(graph.nodes, context), *_slots_filled(graph)]


class _Filled(NamedTuple):
    """Bytes of the ring and the release of their last occupant."""

    lo: int
    hi: int
    release: fx.Node


def _last_releases(graph: fx.Graph, carried: list[fx.Node]) -> list[list[fx.Node]]:
    """For each carried slot the releases of the slots that lie in its bytes at the end of the step.

    Those of older slots are covered: whoever overwrote them has waited for them, and copies run in order.
    """
    filled: list[_Filled] = []
    for node in _slots_filled(graph):
        lo, hi = _bytes_of(node)
        filled = [slot for slot in filled if slot.hi <= lo or hi <= slot.lo]
        filled.append(_Filled(lo, hi, release_of(node)))
    places = [_bytes_of(node) for node in carried]
    return [[slot.release for slot in filled if slot.lo < hi and lo < slot.hi] for lo, hi in places]


def _slots_filled(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target in (ir.CARRIED, ir.PREFETCH)]


def _bytes_of(prefetch: fx.Node) -> tuple[int, int]:
    lo: int = prefetch.args[3]  # type: ignore[assignment]
    return lo, lo + slot_bytes(prefetch)


__all__ = ["carry_prefetches"]
