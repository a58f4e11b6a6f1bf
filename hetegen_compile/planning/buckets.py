"""Buckets of tokens: which one a forward belongs to, and up to which sizes the plan of one keeps room."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping

import sympy

from hetegen_compile.graph_inputs import number
from hetegen_compile.passes.context import Bucket, Context
from hetegen_compile.planning.planned import Sizes

BUCKET_LIMITS = (1, 4, 16, 64, 256)
"""Highest number of tokens of each bucket but the last, which is open."""


def bucket_of(tokens: int) -> Bucket:
    """The bucket that a forward of ``tokens`` tokens belongs to."""
    place = bisect.bisect_left(BUCKET_LIMITS, tokens)
    low = 1 if place == 0 else BUCKET_LIMITS[place - 1] + 1
    return Bucket(low, BUCKET_LIMITS[place] if place < len(BUCKET_LIMITS) else None)


def largest_sizes(
    tokens: sympy.Expr,
    context: Context,
    limits: Mapping[sympy.Symbol, sympy.Integer],
    lengths: Collection[sympy.Symbol],
    *,
    spare: bool,
) -> Sizes:
    """The sizes up to which a plan's memory is reserved.

    ``lengths`` (of caches) reach the stated context. With ``spare`` they reach twice what they are where none is
    stated, and the number of tokens (if one size tells it) the end of the bucket. None exceeds its limit, beyond which
    another graph is called: while the window of a cache is not full, say.
    """
    counted = tokens.free_symbols & context.sizes.keys()
    found: dict[sympy.Symbol, sympy.Integer] = {}
    for symbol, size in context.sizes.items():
        if symbol in lengths:
            found[symbol] = max(size, sympy.Integer(context.options.context or (2 * size if spare else size)))
        elif spare and counted == {symbol}:
            now = number(tokens, context.sizes)
            high = context.bucket.high or 2 * now
            found[symbol] = max(size, size * high // max(1, now))
    return {symbol: min(size, limits.get(symbol, size)) for symbol, size in found.items()}


__all__ = ["BUCKET_LIMITS", "bucket_of", "largest_sizes"]
