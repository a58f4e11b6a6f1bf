"""What a captured prefill says of other forwards is what these take when they are captured themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetegen_compile.passes.caches import Cache, Forward, returned_caches
from hetegen_compile.passes.context import Context
from hetegen_compile.passes.other_forwards import MASK_BYTES, OtherForwards
from tests.passes.graphs import Case, case

HEADS, WIDTH, PROMPT, LENGTH = 4, 16, 8, 40
PROJECT = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def _repeated(heads: Tensor) -> Tensor:
    sequences, number, length, width = heads.shape
    wide = heads[:, :, None].expand(sequences, number, HEADS // number, length, width)
    return wide.reshape(sequences, HEADS, length, width)


def fused(query: Tensor, keys: Tensor, values: Tensor, masked: bool) -> Tensor:
    """As transformers calls it: grouped without a mask, repeated under one."""
    if not masked:
        causal = query.shape[2] > 1
        return F.scaled_dot_product_attention(query, keys, values, is_causal=causal, enable_gqa=True)
    mask = torch.ones(query.shape[0], 1, query.shape[2], keys.shape[2], dtype=torch.bool)
    return F.scaled_dot_product_attention(query, _repeated(keys), _repeated(values), mask)


def step_by_step(query: Tensor, keys: Tensor, values: Tensor, masked: bool) -> Tensor:
    """Attention as products and a softmax."""
    scores = query @ _repeated(keys).transpose(2, 3) * 0.25
    return torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ _repeated(values)


def _layer(x: Tensor, past: list[Tensor], heads: int, attend: Attend, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
    sequences, tokens, _ = x.shape
    query = PROJECT(x).view(sequences, tokens, HEADS, WIDTH).transpose(1, 2)
    new = PROJECT(x)[..., : heads * WIDTH].reshape(sequences, tokens, heads, WIDTH).transpose(1, 2)
    keys, values = (torch.cat([before, new * 2], -2) for before in past)
    out = attend(query, keys, values, masked)
    return keys, values, PROJECT(out.transpose(1, 2).reshape(sequences, tokens, -1))


def _prefill(x: Tensor, heads: int, attend: Attend, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
    nothing = torch.empty(x.shape[0], heads, 0, WIDTH)
    return _layer(x, [nothing, nothing], heads, attend, masked)


def _forwards(attend: Attend, heads: int, tokens: int, masked: bool) -> OtherForwards:
    found = case(lambda x: _prefill(x, heads, attend, masked), torch.randn(2, tokens, HEADS * WIDTH))
    return _other(found, tokens)[0]


def _other(found: Case, tokens: int) -> tuple[OtherForwards, list[Cache]]:
    context = _of(found.context, tokens)
    caches = returned_caches(found.module, context)
    return OtherForwards(found.module, context, caches), list(caches.values())


def _of(context: Context, tokens: int) -> Context:
    return replace(context, sequences=2, tokens_per_sequence=tokens)


@pytest.mark.parametrize(
    ("attend", "heads", "masked"),
    [(fused, 4, False), (fused, 2, False), (fused, 2, True), (fused, 1, True), (step_by_step, 2, False)],
)
def test_a_step_takes_what_its_prefill_says(attend: Attend, heads: int, masked: bool) -> None:
    """The step is captured with a cache of its own, as an input.

    A product of queries of several tokens copies them, of one it does not; that is counted as a copy of the keys.
    """
    before = [torch.randn(2, heads, LENGTH - 1, WIDTH) for _ in range(2)]
    step = case(lambda x, k, v: _layer(x, [k, v], heads, attend, masked), torch.randn(2, 1, HEADS * WIDTH), *before)
    step_itself, _ = _other(step, 1)
    exact = step_itself.peak_bytes(step_itself.captured)
    found = _forwards(attend, heads, PROMPT, masked).peak_bytes(Forward(1, LENGTH))
    copied = HEADS * 2 * LENGTH * WIDTH * 4 if attend is step_by_step else 0
    assert exact <= found <= 1.05 * exact + copied


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_padded_prefill_takes_what_one_with_a_mask_takes(heads: int) -> None:
    alone, padded = (_forwards(fused, heads, PROMPT, masked) for masked in (False, True))
    exact = padded.peak_bytes(padded.captured)
    found = alone.peak_bytes(replace(alone.captured, padded=True))
    assert exact <= found <= 1.05 * exact
    assert (found > 1.2 * alone.peak_bytes(alone.captured)) == (heads == 2), "only then something is repeated"


def made_for_all(query: Tensor, keys: Tensor, values: Tensor, masked: bool) -> Tensor:
    """One mask for all sequences, or (``masked``) one for each."""
    causal = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool).tril()
    if masked:
        causal = causal & torch.ones(query.shape[0], 1, 1, keys.shape[2], dtype=torch.bool)
    else:
        causal = causal[None, None].expand(query.shape[0], 1, -1, -1)
    return F.scaled_dot_product_attention(query, _repeated(keys), _repeated(values), causal)


def by_rows(query: Tensor, keys: Tensor, values: Tensor, masked: bool) -> Tensor:
    """One mask, of two dimensions."""
    causal = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(query, _repeated(keys), _repeated(values), causal)


@pytest.mark.parametrize("attend", [made_for_all, by_rows])
def test_a_mask_that_a_graph_makes_for_all_sequences_is_one_for_each_if_they_are_padded(attend: Attend) -> None:
    """And an integer for each token is given, which it is made of."""
    tokens = 128
    alone, exact = _forwards(attend, 2, tokens, False), _forwards(made_for_all, 2, tokens, True)
    found = alone.peak_bytes(replace(alone.captured, padded=True))
    assert found - alone.peak_bytes(alone.captured) == (tokens + 2 * MASK_BYTES) * tokens
    assert attend is by_rows or found >= exact.peak_bytes(exact.captured)


def test_a_full_window_is_masked_and_grows_no_more() -> None:
    def prefill(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, out = _prefill(x, 2, fused, False)
        return keys[:, :, -11:, :], values[:, :, -11:, :], out

    found = case(prefill, torch.randn(2, PROMPT, HEADS * WIDTH))
    forwards, caches = _other(found, PROMPT)
    assert {cache.window for cache in caches} == {11}
    full, longer, before = (forwards.peak_bytes(Forward(1, length)) for length in (12, 100, 11))
    assert full == longer
    repeated = 2 * HEADS * 12 * WIDTH * 4
    assert before < full - 2 * repeated, "keys and values"


def test_a_static_cache_is_masked_in_the_steps_after_it() -> None:
    def prefill(x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values, out = _prefill(x, 2, fused, False)
        cache = torch.zeros(2, 2, LENGTH, WIDTH)
        cache.index_copy_(2, torch.arange(PROMPT), keys)
        seen = cache[:, :, :PROMPT]
        return cache, fused(out.view(2, PROMPT, HEADS, WIDTH).transpose(1, 2), seen, seen, False).flatten(2)

    found = case(prefill, torch.randn(2, PROMPT, HEADS * WIDTH))
    forwards, caches = _other(found, PROMPT)
    (cache,) = [cache for cache in caches if cache.written]
    assert (cache.grows, cache.tokens) == (False, LENGTH)
    repeated = 2 * HEADS * LENGTH * WIDTH * 4
    step = forwards.peak_bytes(Forward(1, PROMPT))
    assert cache.nbytes + 2 * repeated < step < 1.2 * (cache.nbytes + 2 * repeated)
    assert forwards.peak_bytes(Forward(1, 10 * LENGTH)) <= 1.1 * step


def test_what_only_lengthens_a_cache_says_nothing_of_later_steps() -> None:
    before = torch.randn(2, 2, PROMPT - 1, WIDTH)
    step = case(lambda x, k: _layer(x, [k, k], 2, fused, False), torch.randn(2, 1, HEADS * WIDTH), before)
    _, caches = _other(step, PROMPT)
    assert caches
    assert not any(cache.grows or cache.written for cache in caches)
