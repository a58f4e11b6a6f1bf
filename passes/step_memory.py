"""What a step needs on the accelerator whatever is resident: mirrors, activations, room for what grows.

Whatever is stated (``context``, ``max_batch``) is counted before it comes: a cache up to that many tokens, and for each
sequence more another set of inputs, caches and activations.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from math import ceil

import sympy
from torch import Tensor, fx

from hetegen_compile.geometry import mirrored_bytes, storage_id
from hetegen_compile.ir import INPUT_OPS, LINEAR, info, is_tensor, written_storages
from hetegen_compile.passes.annotate_costs import value_size
from hetegen_compile.passes.append_behind import lengthened_inputs
from hetegen_compile.passes.beside_caches import bytes_beside
from hetegen_compile.passes.caches import Cache, Forward, longest_cache, longest_forward, returned_caches
from hetegen_compile.passes.choose_splits import table_only
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.liveness import activation_peak_bytes
from hetegen_compile.passes.other_forwards import MASK_BYTES, OtherForwards
from hetegen_compile.passes.plans import ACTIVATIONS, BATCHES, BESIDE, GROWTH, MIRRORED
from hetegen_compile.passes.tensors import to_expr
from hetegen_compile.passes.unsplit_weights import computed_on_host


def step_memory(
    module: fx.GraphModule, weights: Iterable[fx.Node], context: Context, size: sympy.Expr,
    unsplit: Collection[fx.Node] = (),
) -> Mapping[str, int]:  # fmt: skip
    """Bytes item by item. ``weights`` are the placeholders of the Linears' weights, ``size`` is ``mirrored_size``.

    What is computed with the weights ``unsplit`` alone is taken to be on the host in later forwards.
    """
    known = context.activation_bytes
    activations = _estimated_activations(module, context) if known is None else known
    later, more = 0, activations
    if context.tokens_per_sequence:
        names = {node.name for node in unsplit}
        on_host = computed_on_host(list(module.graph.nodes), names, context.weights) if names else set()
        later, more = _other_forwards(module, context, activations, on_host)
    return {
        MIRRORED: int(context.number(size)),
        ACTIVATIONS: activations,
        GROWTH: context.room(size) - int(context.number(size)) + later,
        BATCHES: _more_sequences(module, weights, context, activations + later, more),
        **({BESIDE: beside} if (beside := bytes_beside(module, context, activations)) else {}),
    }


def foresees_steps(module: fx.GraphModule, context: Context) -> bool:
    """Whether steps after this forward are counted that another graph serves: those that get the caches it makes."""
    return bool(context.tokens_per_sequence) and _makes_caches(returned_caches(module, context))


def _makes_caches(caches: Mapping[int, Cache]) -> bool:
    return any(cache.grows or cache.written for cache in caches.values())


def mirrored_size(
    module: fx.GraphModule, weights: Iterable[fx.Node], context: Context, on_host: Collection[fx.Node] = ()
) -> sympy.Expr:
    """Bytes of the mirrors of all inputs that the accelerator reads, an expression over the graph's sizes.

    It does not read ``on_host``, nor the weights of Linears as a whole. A cache that it lengthens has the longer one's.
    """
    skipped = {weight for weight in weights if all(user.target == LINEAR for user in weight.users)} | set(on_host)
    mirrored = [
        node for node in module.graph.nodes
        if node.op in INPUT_OPS and is_tensor(node) and node.users and node not in skipped
        and not table_only(node, context)
    ]  # fmt: skip
    sharing: dict[int, list[fx.Node]] = {}
    for node in mirrored:
        sharing.setdefault(storage_id(info(node).value), []).append(node)
    written, longer = written_storages(module.graph.nodes), lengthened_inputs(module.graph.nodes)
    # one that is lengthened lies by itself: it leaves nothing, but what it shared with others
    as_given = {key: nodes for key, nodes in sharing.items() if len(nodes) > 1 or nodes[0] not in longer}
    sizes = [_mirrors_size(nodes, context, key in written) for key, nodes in as_given.items()]
    return sympy.Add(*sizes, *(value_size(longer[node]) for node in mirrored if node in longer))


def _mirrors_size(sharing: list[fx.Node], context: Context, written: bool) -> sympy.Expr:
    """Bytes of the mirrors of the inputs that lie in one storage.

    Several that the graph writes are views of a mirror of all of it, as is each that would take as much by itself.
    """
    value: Tensor = info(sharing[0]).value
    storage_size = to_expr(value.untyped_storage().nbytes())
    apart = [] if written and len(sharing) > 1 else [node for node in sharing if _by_itself(node, context)]
    whole = storage_size if len(apart) < len(sharing) else sympy.Integer(0)
    return sympy.Add(whole, *map(value_size, apart))


def _by_itself(node: fx.Node, context: Context) -> bool:
    """Whether an input's mirror is not one of its whole storage."""
    value: Tensor = info(node).value
    shape, stride = ([int(context.number(to_expr(n))) for n in ns] for ns in (value.shape, value.stride()))
    storage_bytes = int(context.number(to_expr(value.untyped_storage().nbytes())))
    own = int(context.number(value_size(node)))
    return own == storage_bytes or mirrored_bytes(shape, stride, value.element_size(), storage_bytes) == own


def _more_sequences(
    module: fx.GraphModule, weights: Iterable[fx.Node], context: Context, alone: int, padded: int
) -> int:
    """Bytes that ``max_batch`` sequences take beyond those of this call.

    ``alone`` are the bytes of activations and of caches of these, ``padded`` those under a mask.
    """
    now = max(1, context.sequences)
    if context.options.max_batch <= now:
        return 0
    models = {node for node in module.graph.nodes if node.op == "get_attr" or node.name in context.weights}
    given = context.room(mirrored_size(module, weights, context, models))
    return -(-context.options.max_batch * (given + padded) // now) - given - alone


def _other_forwards(
    module: fx.GraphModule, context: Context, activations: int, on_host: Collection[fx.Node]
) -> tuple[int, int]:
    """Bytes that a step after one of fixed length (a prefill) takes beyond its activations; all bytes if padded.

    What its schedule takes beyond the values of the captured graph it takes for one token, too: no more than in
    proportion to what its Linears read and make, where those of a prompt are of something else (an encoder's states).
    """
    caches = returned_caches(module, context)
    if not _makes_caches(caches):
        return 0, activations
    forwards = OtherForwards(module, context, caches, on_host)
    captured = forwards.peak_bytes(forwards.captured)
    scheduled = max(0, activations - captured)

    def later(padded: bool) -> int:
        forward = longest_forward(caches.values(), context, padded=padded)
        if forward is None:
            return 0
        comes = sum(one.bytes_after(forward.before) for one in caches.values() if one.grows and not one.room)
        linear = forwards.linear_bytes(forward)
        of_linears = Fraction(linear, max(1, forwards.linear_bytes(forwards.captured)))
        share = min(Fraction(1, context.tokens_per_sequence), of_linears)
        made = forwards.peak_bytes(forward) + ceil(scheduled * share) + linear
        return comes + max(made, _moving_bytes(caches.values(), forward)) - forwards.idle_bytes(forward)

    alone = max(0, later(False) - activations)
    if context.options.max_batch <= context.sequences:
        return alone, activations
    beyond = scheduled + forwards.linear_bytes(forwards.captured)
    pairs = zip(forwards.bytes_at(forwards.captured), forwards.bytes_at(_padded(forwards.captured)), strict=True)
    masked = max(min(activations, before + beyond) + after - before for before, after in pairs)
    return alone, max(activations, masked + _longest_mask_bytes(context), later(True))


def _moving_bytes(caches: Iterable[Cache], forward: Forward) -> int:
    """Most bytes of caches with room while one of them is moved to where it has it: before a step, which makes nothing
    yet."""
    with_room = [one.bytes_after(forward) for one in caches if one.room]
    return sum(with_room) + max(with_room, default=0)


def _padded(forward: Forward) -> Forward:
    return replace(forward, padded=True)


def _longest_mask_bytes(context: Context) -> int:
    """What a mask that is given with a prefill may take beyond its tokens: its length is a size of its own."""
    longer = max(0, longest_cache(context) - context.tokens_per_sequence)
    return MASK_BYTES * context.sequences * longer


def _estimated_activations(module: fx.GraphModule, context: Context) -> int:
    """Before there is a schedule: values of the captured graph, and a Linear's input and output once more."""
    linear_io = [
        context.room(value_size(node) + value_size(node.args[0]))
        for node in module.graph.nodes
        if node.target == LINEAR
    ]
    return activation_peak_bytes(module, context) + max(linear_io, default=0)
