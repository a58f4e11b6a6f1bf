"""What caches that grow take beside themselves.

A cache that is lengthened where it lies (``append_behind``) is moved now and then to where it has more room: one at a
time, before a step. One that is made anew in each step is there twice, which the plan's other items have.

On a GPU torch's allocator decides what memory that takes. (Its rules are those of torch 2.13: up to 1 MiB tensors share
blocks of 2 MiB, up to 10 MiB blocks of 20 MiB, and larger ones have their own.)

- Caches of a size that fits its blocks badly leave pieces between them.
- What caches leave that have moved fits nothing longer unless neighbours of it are free, too. So all that outgrow what
  they lie in count once more, and of those that are made anew a third generation lies beside the two of a step. What
  is beyond that is given back between steps.
"""

from __future__ import annotations

import sympy
from torch import Tensor, fx

from hetegen_compile.geometry import storage_id
from hetegen_compile.ir import info, written_storages
from hetegen_compile.passes.append_behind import lengthened_inputs, lengthens
from hetegen_compile.passes.caches import given_tensors, longest_forward, returned_caches
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.tensors import tensor_bytes, tensors_in, to_expr
from hetegen_compile.passes.windows import CACHE_DIMS, TOKENS, window_of

_UNIT_BYTES = 512
_BLOCKS = ((1 << 20, 2 << 20), (10 << 20, 20 << 20))
"""Up to which size tensors lie in blocks of the allocator, and how large these are."""
_OWN_UNIT_BYTES = 2 << 20
"""What a block of a single tensor is rounded to."""


def size_beside(module: fx.GraphModule, context: Context) -> sympy.Expr:
    """Bytes that a forward which outgrows its plan needs beside its caches, an expression over the graph's sizes."""
    left = [*_made_anew(module, context), *_lengthened(module)] if context.largest_twice else []
    return sympy.Add(*map(tensor_bytes, left))


def bytes_beside(module: fx.GraphModule, context: Context, activations: int) -> int:
    """Bytes beside caches at the largest sizes, those of the steps after a prefill, too.

    One is moved before a step makes its ``activations``. With a stated context none outgrows what it lies in; without,
    all have when a plan for longer ones is made.
    """
    lengthened, anew = _lengthened(module), _made_anew(module, context)
    moved = max((context.room(tensor_bytes(one)) for one in lengthened), default=0)
    if not context.largest_twice:
        return max(0, moved - activations)
    found = sum(_of_all_sequences(one, context.room(tensor_bytes(one)), context) for one in anew)
    for one in lengthened:
        found += _left_by(one, context.room(tensor_bytes(one)), context)
    caches = returned_caches(module, context)
    forward = longest_forward(caches.values(), context)
    made = [tensor for node in module.graph.output_node().all_input_nodes for tensor in tensors_in(info(node).value)]
    for one in {storage_id(tensor): tensor for tensor in made}.values():
        cache = caches.get(storage_id(one))
        if forward is not None and cache is not None and cache.grows and cache.window is None:
            nbytes = cache.bytes_after(forward)
            found += _left_by(one, nbytes, context) if cache.room else _of_all_sequences(one, nbytes, context)
    return max(found, moved - activations)


def reserved_bytes(nbytes: int) -> int:
    """What torch's allocator reserves on a GPU for one of many tensors of so many bytes."""
    nbytes = -(-nbytes // _UNIT_BYTES) * _UNIT_BYTES
    for most, block in _BLOCKS:
        if 0 < nbytes <= most:
            return block // (block // nbytes)
    return -(-nbytes // _OWN_UNIT_BYTES) * _OWN_UNIT_BYTES


def _left_by(cache: Tensor, nbytes: int, context: Context) -> int:
    """What is left on a GPU by a cache that is lengthened where it lies, in memory of ``nbytes``."""
    of_all = _of_all_sequences(cache, nbytes, context)
    outgrown = 0 if context.options.context else int(context.number(tensor_bytes(cache)))
    return reserved_bytes(of_all) - of_all + _of_all_sequences(cache, outgrown, context)


def _lengthened(module: fx.GraphModule) -> list[Tensor]:
    """The longer ones of the caches that a graph lengthens where they lie."""
    return [info(node).value for node in lengthened_inputs(module.graph.nodes).values()]


def _made_anew(module: fx.GraphModule, context: Context) -> list[Tensor]:
    """The caches that a graph copies into longer ones.

    Not those that are written in place (static caches), nor windows: their sizes stay.
    """
    written, found = written_storages(module.graph.nodes), dict[int, Tensor]()
    for node in module.graph.output_node().all_input_nodes:
        given = [tensor for one in node.all_input_nodes for tensor in given_tensors(one) if tensor.dim() >= CACHE_DIMS]
        copied = given and window_of(node) is None and not lengthens(node)
        for tensor in tensors_in(info(node).value) if copied else ():
            length = to_expr(tensor.shape[TOKENS]) if tensor.dim() >= CACHE_DIMS else sympy.Integer(0)
            if length.free_symbols & context.lengths and storage_id(tensor) not in written:
                found[storage_id(tensor)] = tensor
    return list(found.values())


def _of_all_sequences(cache: Tensor, nbytes: int, context: Context) -> int:
    """``nbytes`` of a cache at the largest sizes, for ``max_batch`` sequences if it has fewer."""
    sequences = max(1, context.room(to_expr(cache.shape[-CACHE_DIMS])))
    return -(-max(context.options.max_batch, sequences) * nbytes // sequences)


__all__ = ["bytes_beside", "reserved_bytes", "size_beside"]
