"""Compilers of segments: Inductor, and plain FX for tests that are about something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode

from hetegen_compile.passes.context import SegmentCompiler

INDUCTOR_OPTIONS: dict[str, Any] = {
    "triton.cudagraph_trees": False,  # trees would copy slots at every replay
    "triton.cudagraphs": False,
    "freezing": False,  # weights are inputs and may change
    "shape_padding": False,
    "max_autotune": False,
    "deterministic": True,  # nothing is timed on the device: that takes memory beside the budget, and varies results
    "triton.autotune_pointwise": False,  # the same for kernels whose results do not depend on it
    "joint_graph_constant_folding": False,  # needs a device that can run the constants
}


def inductor_compiler(mode: FakeTensorMode) -> SegmentCompiler:
    """Compile with Inductor; example values are fakes and SymInts of ``mode``.

    As in Dynamo's own graphs every symbol of the examples' sizes is an input by itself (``group_segments`` sees to it):
    Inductor does not solve ``s + 1`` for ``s``, and its cache on disk checks guards by these inputs alone.
    """

    def compile_segment(segment: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        context = TracingContext(mode)
        with tracing(context), inductor_config.patch(INDUCTOR_OPTIONS), torch.no_grad():
            compiled = compile_fx(segment, list(examples))
        assert callable(compiled)
        return compiled

    return compile_segment


def plain_compiler(mode: FakeTensorMode) -> SegmentCompiler:
    """Run the segment as plain FX code."""
    del mode

    def compile_segment(segment: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        del examples
        forward: Callable[..., Any] = segment.forward
        return forward

    return compile_segment
