"""Compilers of segments: Inductor, and plain FX for tests that are about something else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor.exc import CppCompileError, InductorError
from torch._subclasses.fake_tensor import FakeTensorMode

from hetegen_compile.passes.context import SegmentCompiler

logger = logging.getLogger("hetegen_compile")

INDUCTOR_OPTIONS: dict[str, Any] = {
    "triton.cudagraph_trees": False,  # trees would copy slots at every replay
    "triton.cudagraphs": False,
    "freezing": False,  # weights are inputs and may change
    "shape_padding": False,
    "max_autotune": False,
    "joint_graph_constant_folding": False,  # needs a device that can run the constants
}


NO_INDEX_PROPAGATION: dict[str, Any] = {"constant_and_index_propagation": False}
"""For C++ that does not compile. Torch 2.11 writes a check of an index that comes from ``arange`` and is bounded by a
symbolic size (a mask, picked by positions) in front of what it checks; kept as data, the index is checked behind it."""


def inductor_compiler(mode: FakeTensorMode) -> SegmentCompiler:
    """Compile with Inductor; example values are fakes and SymInts of ``mode``."""

    def compile_segment(segment: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        try:
            return _inductor(mode, segment, examples, INDUCTOR_OPTIONS)
        except (CppCompileError, InductorError) as error:
            if not isinstance(getattr(error, "inner_exception", error), CppCompileError):
                raise
            logger.debug("Inductor's C++ does not compile; once more without index propagation", exc_info=error)
        return _inductor(mode, segment, examples, INDUCTOR_OPTIONS | NO_INDEX_PROPAGATION)

    return compile_segment


def _inductor(
    mode: FakeTensorMode, segment: fx.GraphModule, examples: Sequence[Any], options: dict[str, Any]
) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    context = TracingContext(mode)
    with tracing(context), inductor_config.patch(options), torch.no_grad():
        compiled = compile_fx(segment, list(examples))
    assert callable(compiled)
    return compiled


def plain_compiler(mode: FakeTensorMode) -> SegmentCompiler:
    """Run the segment as plain FX code."""
    del mode

    def compile_segment(segment: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        del examples
        forward: Callable[..., Any] = segment.forward
        return forward

    return compile_segment
