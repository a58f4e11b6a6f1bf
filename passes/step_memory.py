"""What a step needs on the accelerator whatever is resident: mirrors, activations, room for what grows.

Whatever is stated (``context``, ``max_batch``) is counted before it comes: a cache up to that many tokens, and for each
sequence more another set of inputs, caches and activations.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import sympy
from torch import Tensor, fx

from hetegen_compile.geometry import mirrored_bytes
from hetegen_compile.ir import LINEAR, info, is_tensor, written_storages
from hetegen_compile.passes.annotate_costs import value_size
from hetegen_compile.passes.choose_splits import table_only
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.liveness import activation_peak_bytes
from hetegen_compile.passes.plans import ACTIVATIONS, BATCHES, GROWTH, MIRRORED
from hetegen_compile.passes.tensors import storage_id, tensor_bytes, tensors_in, to_expr
from hetegen_compile.passes.windows import CACHE_DIMS, TOKENS, window_of


def step_memory(
    module: fx.GraphModule, weights: Iterable[fx.Node], context: Context, size: sympy.Expr
) -> Mapping[str, int]:
    """Bytes item by item. ``weights`` are the placeholders of the Linears' weights, ``size`` is ``mirrored_size``."""
    known = context.activation_bytes
    activations = _estimated_activations(module, context) if known is None else known
    later = _later_steps(module, context, activations)
    return {
        MIRRORED: int(context.number(size)),
        ACTIVATIONS: activations,
        GROWTH: context.room(size) - int(context.number(size)) + later,
        BATCHES: _more_sequences(module, weights, context, activations + later),
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


def _more_sequences(module: fx.GraphModule, weights: Iterable[fx.Node], context: Context, made: int) -> int:
    """Bytes that ``max_batch`` sequences take beyond those of this call, each what one of these does.

    ``made`` are the bytes of activations and of caches in later graphs. Several sequences may be padded: under a mask
    attention repeats keys and values for the heads of queries that share them.
    """
    now = max(1, context.sequences)
    more = context.options.max_batch - now
    if more <= 0:
        return 0
    models = {node for node in module.graph.nodes if node.op == "get_attr" or node.name in context.weights}
    given = context.room(mirrored_size(module, weights, context, models))
    tokens = context.tokens_per_sequence
    caches = [cache for cache in _caches(module, context) if cache.shared > 1]
    repeated = max((2 * cache.token_bytes * tokens * cache.shared for cache in caches), default=0)
    return -(-(more * (given + made + repeated) + now * repeated) // now)


def _later_steps(module: fx.GraphModule, context: Context, activations: int) -> int:
    """Bytes that a step after one of fixed length (a prefill) takes beyond the activations of that.

    It holds a growing cache twice, as it comes and as it goes, what attention makes of a layer's, and activations of
    a token; of three, since some of them do not get fewer with the tokens.
    """
    tokens = max(1, context.tokens_per_sequence)
    length = context.options.context or (2 * tokens if context.spare else 0)
    caches = _caches(module, context)
    if not caches or not length:
        return 0
    whole = sum(cache.token_bytes for cache in caches) * tokens
    held = sum(cache.held_bytes(length) for cache in caches)
    attended = max(cache.attended_bytes(length) for cache in caches)
    return max(0, held + attended + 3 * max(0, activations - whole) // tokens - activations)


@dataclass(frozen=True)
class _Cache:
    """A cache that a graph of fixed length makes.

    Attributes:
        token_bytes: of one token.
        scores: of attention for one token: of all sequences and heads of queries.
        shared: how many heads of queries share a head of it.
        window: tokens that it keeps at most; None: all.
    """

    token_bytes: int
    scores: int
    shared: int
    window: int | None

    def held_bytes(self, length: int) -> int:
        """As a step of ``length`` tokens gets it and as it leaves it; of windows what they are cut from."""
        return 2 * self.token_bytes * self._tokens(length)

    def attended_bytes(self, length: int) -> int:
        """What attention makes of it: keys scaled; where heads of queries share them keys and values repeated for
        each, and once more inside; scores in float32 as they are, under a mask and as weights."""
        repeated = self.token_bytes * (4 * self.shared if self.shared > 1 else 1)
        return (repeated + 3 * 4 * self.scores) * self._tokens(length)

    def _tokens(self, length: int) -> int:
        return length if self.window is None else min(length, self.window + 1)


def _caches(module: fx.GraphModule, context: Context) -> list[_Cache]:
    """The caches that a graph of fixed length makes. Of a window what it is cut from is looked at.

    What has symbols is no query of such a cache, and comparing those with numbers would make guards of them.
    """
    tensors = [tensor for node in module.graph.nodes for tensor in tensors_in(info(node).value)]
    wide = [tensor.shape for tensor in tensors if tensor.dim() >= CACHE_DIMS and not _symbolic(tensor)]
    found = []
    for node in module.graph.output_node().all_input_nodes:
        window = window_of(node)
        for cache in tensors_in(info(node if window is None else node.all_input_nodes[0]).value):
            if is_new_cache(cache, context.tokens_per_sequence):
                sequences, heads, *rest = cache.shape
                queries = max(shape[1] for shape in wide if [shape[0], *shape[2:]] == [sequences, *rest])
                nbytes = context.room(tensor_bytes(cache)) // int(cache.shape[TOKENS])
                found.append(_Cache(nbytes, int(sequences * queries), int(queries // max(1, heads)), window))
    return found


def caches_grow(module: fx.GraphModule, context: Context) -> bool:
    """Whether later forwards may bring longer caches than this one does."""
    ends = [node for node in module.graph.nodes if node.op in ("placeholder", "output")]
    tensors = [tensor for node in ends for tensor in tensors_in(info(node).value) if tensor.dim() >= CACHE_DIMS]
    return any(_symbolic(tensor) or is_new_cache(tensor, context.tokens_per_sequence) for tensor in tensors)


def _symbolic(tensor: Tensor) -> bool:
    return any(to_expr(size).free_symbols for size in tensor.shape)


def is_new_cache(tensor: Tensor, tokens: int) -> bool:
    """Whether a graph that is given ``tokens`` of each sequence (0: no fixed number) returns this as their cache."""
    if tensor.dim() < CACHE_DIMS or _symbolic(tensor) or not tokens:
        return False
    return int(tensor.shape[TOKENS]) == tokens


def _estimated_activations(module: fx.GraphModule, context: Context) -> int:
    """Before there is a schedule: values of the captured graph, and a Linear's input and output once more."""
    linear_io = [
        context.room(value_size(node) + value_size(node.args[0]))
        for node in module.graph.nodes if node.target == LINEAR
    ]
    return activation_peak_bytes(module, context) + max(linear_io, default=0)
