"""What a step needs on the accelerator whatever is resident: mirrors, activations, room for what grows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import sympy
from torch import Tensor, fx

from hetegen_compile.geometry import mirrored_bytes
from hetegen_compile.ir import LINEAR, info, is_tensor, written_storages
from hetegen_compile.passes.annotate_costs import value_size
from hetegen_compile.passes.capture import storage_id, tensor_bytes, tensors_in, to_expr
from hetegen_compile.passes.choose_splits import table_only
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.liveness import activation_peak_bytes
from hetegen_compile.passes.plans import ACTIVATIONS, GROWTH, MIRRORED

_CACHE_DIMS = 4  # a KV cache is [sequences, heads, tokens, width]; logits and hidden states have three


def step_memory(
    module: fx.GraphModule, weights: Iterable[fx.Node], context: Context, size: sympy.Expr
) -> Mapping[str, int]:
    """Bytes item by item. ``weights`` are the placeholders of the Linears' weights, ``size`` is ``mirrored_size``."""
    activations = context.activation_bytes
    return {
        MIRRORED: int(context.number(size)),
        ACTIVATIONS: _estimated_activations(module, context) if activations is None else activations,
        GROWTH: context.room(size) - int(context.number(size)) + _later_graphs(module, weights, context),
    }


def mirrored_size(
    module: fx.GraphModule, weights: Iterable[fx.Node], context: Context, on_host: Collection[fx.Node] = ()
) -> sympy.Expr:
    """Bytes of the mirrors of all inputs that the accelerator reads, an expression over the graph's sizes.

    It does not read ``on_host``, nor the weights of Linears as a whole.
    """
    skipped = {weight for weight in weights if all(user.target == LINEAR for user in weight.users)} | set(on_host)
    mirrored = [
        node for node in module.graph.nodes
        if node.op in ("placeholder", "get_attr") and is_tensor(node) and node not in skipped
        and not table_only(node, context)
    ]
    sharing: dict[int, list[fx.Node]] = {}
    for node in mirrored:
        sharing.setdefault(storage_id(info(node).value), []).append(node)
    written = written_storages(module.graph.nodes)
    return sympy.Add(*(_mirrors_size(nodes, context, key in written) for key, nodes in sharing.items()))


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


def _later_graphs(module: fx.GraphModule, weights: Iterable[fx.Node], context: Context) -> int:
    """Bytes that caches take in graphs still to come: for ``max_batch`` sequences and, where this graph's length
    is fixed (a prefill), for the tokens that follow it.

    A later step holds a growing cache twice: as it comes and as it goes.
    """
    batches = max(1.0, context.options.max_batch / max(1, context.sequences))
    skipped = set(weights)
    ends = [node for node in module.graph.nodes if node.op in ("placeholder", "output") and node not in skipped]
    tensors = [tensor for node in ends for tensor in tensors_in(info(node).value)]
    growing = sum(context.room(tensor_bytes(t)) for t in tensors if _symbolic(t))
    fixed = sum(context.room(tensor_bytes(t)) for t in tensors if _is_new_cache(t, context))
    length = context.options.context or (2 * context.tokens_per_sequence if context.spare else 0)
    times = 2 * batches * length / max(1, context.tokens_per_sequence) - 1
    return round(growing * (batches - 1) + fixed * max(0.0, times))


def _symbolic(tensor: Tensor) -> bool:
    return any(to_expr(size).free_symbols for size in tensor.shape)


def _is_new_cache(tensor: Tensor, context: Context) -> bool:
    """Whether a fixed-length graph returns this as the cache of the tokens that it was given."""
    if tensor.dim() < _CACHE_DIMS or _symbolic(tensor) or not context.tokens_per_sequence:
        return False
    return int(tensor.shape[-2]) == context.tokens_per_sequence


def _estimated_activations(module: fx.GraphModule, context: Context) -> int:
    """Before there is a schedule: values of the captured graph, and a Linear's input and output once more."""
    linear_io = [
        context.room(value_size(node) + value_size(node.args[0]))
        for node in module.graph.nodes if node.target == LINEAR
    ]
    return activation_peak_bytes(module, context) + max(linear_io, default=0)
