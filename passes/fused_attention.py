"""Which kernel fused attention is compiled to, and what it makes beside its result at sizes that it has not been
called with.

For the latter it is called with fakes of these sizes: whether scores are made, masks become numbers or shared heads
are repeated depends on the kernel that torch chooses, and that on the sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from hetegen_compile.passes.aten_listener import AtenListener
from hetegen_compile.passes.tensors import tensor_bytes
from hetegen_compile.passes.windows import TOKENS

Shape = tuple[int, ...]

_HEADS = -3

_DEFAULTS: dict[str, Any] = {
    "query": None, "key": None, "value": None, "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None,
    "enable_gqa": False,
}  # fmt: skip
"""Arguments of fused attention in their order."""


@dataclass(frozen=True)
class Attention:
    """A call of fused attention: shapes, types and numbers."""

    query: Shape
    key: Shape
    value: Shape
    dtype: torch.dtype
    mask: Shape | None
    mask_dtype: torch.dtype
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool

    def resized(self, tokens: int, length: int) -> Attention:
        """The same call for as many ``tokens`` that ask and ``length`` that are looked at."""
        key, value = (_with(shape, TOKENS, length) for shape in (self.key, self.value))
        mask = self.mask
        if mask is not None:
            across = (mask[TOKENS], tokens), (mask[-1], length)
            mask = (*mask[:TOKENS], *(1 if was == 1 and self.query[TOKENS] != 1 else size for was, size in across))
        causal = self.is_causal and tokens > 1
        return replace(
            self, query=_with(self.query, TOKENS, tokens), key=key, value=value, mask=mask, is_causal=causal
        )  # fmt: skip

    def padded(self) -> Attention:
        """The call under a mask, with keys and values repeated for the heads that share them."""
        mask = self.query[0], 1, self.query[TOKENS], self.key[TOKENS]
        return replace(self, mask=mask, mask_dtype=torch.bool, is_causal=False, enable_gqa=False)

    @property
    def shared_by(self) -> int:
        """How many heads of queries share a head of keys."""
        return self.query[_HEADS] // self.key[_HEADS]

    def repeated_bytes(self) -> Iterator[int]:
        """Bytes of keys and of values for all heads; one head for all needs no copy."""
        if self.shared_by > 1 and self.key[_HEADS] > 1:
            yield from (self.shared_by * prod(shape) * self.dtype.itemsize for shape in (self.key, self.value))


def _repeated(heads: Tensor, times: int) -> Tensor:
    """[sequences, heads, tokens, width] with each head several times, in turn."""
    sequences, number, *rest = heads.shape
    return heads[:, :, None].expand(sequences, number, times, *rest).reshape(sequences, number * times, *rest)


def _with(shape: Shape, place: int, size: int) -> Shape:
    return (*shape[:place], size, *shape[len(shape) + place + 1 :])


def is_fused_attention(node: fx.Node) -> bool:
    """Whether a node calls torch's fused attention."""
    return node.target is F.scaled_dot_product_attention


def attention_arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call of fused attention by name."""
    return {**_DEFAULTS, **dict(zip(_DEFAULTS, node.args, strict=False)), **node.kwargs}


@contextmanager
def attention_at_any_length(inputs: Sequence[Any]) -> Iterator[None]:
    """Inside, attention among ``inputs`` with symbolic sizes is traced to another kernel than cuDNN's, if another fused
    one is allowed. The flag is the process's: what other threads trace or run meanwhile takes another kernel, too.

    torch 2.11 and newer prefer cuDNN's on Hopper and datacentre Blackwell. It builds a plan for every length that it
    meets (others report 23 to 440 ms of the host's time), and a cache that grows has another length in each step.
    """
    backends = torch.backends.cuda
    sizes = [size for one in inputs for size in (one.shape if isinstance(one, Tensor) else (one,))]
    others = backends.flash_sdp_enabled() or backends.mem_efficient_sdp_enabled()
    left_out = backends.cudnn_sdp_enabled() and others and any(isinstance(size, torch.SymInt) for size in sizes)
    if left_out:
        backends.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        if left_out:
            backends.enable_cudnn_sdp(True)


@cache
def scratch_bytes(call: Attention) -> int:
    """Bytes that a call makes beside its result."""
    with torch.no_grad(), FakeTensorMode(), enable_python_dispatcher(), AtenListener() as listener:
        query, key, value = (torch.empty(shape, dtype=call.dtype) for shape in (call.query, call.key, call.value))
        mask = None if call.mask is None else torch.empty(call.mask, dtype=call.mask_dtype)
        if call.shared_by > 1 and not call.enable_gqa:
            key, value = (_repeated(tensor, call.shared_by) for tensor in (key, value))
        listener.take()
        result = F.scaled_dot_product_attention(
            query, key, value, mask, call.dropout_p, call.is_causal, scale=call.scale, enable_gqa=call.enable_gqa
        )
        return int(listener.take()["made_bytes"]) - int(tensor_bytes(result))


__all__ = [
    "Attention", "Shape", "attention_arguments", "attention_at_any_length", "is_fused_attention", "scratch_bytes",
]  # fmt: skip
