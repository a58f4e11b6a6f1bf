"""Compilers of segments: Inductor, and plain FX for tests that are about something else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hetegen_compile.passes.context import SegmentCompiler
from hetegen_compile.passes.fused_attention import attention_at_any_length
from hetegen_compile.passes.segment_calls import BoxedCode, CompiledCall

logger = logging.getLogger("hetegen_compile")

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
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        context = TracingContext(mode)
        boxed: list[BoxedCode | None] = []
        # AOTAutograd switches autocast off around code that it compiles, and takes subclasses apart
        has_layers = torch._C._is_any_autocast_enabled() or any(map(is_traceable_wrapper_subclass, examples))

        def compile_inner(graph: fx.GraphModule, inputs: Sequence[Any], **how: Any) -> Any:
            code = compile_fx_inner(graph, inputs, **how)
            boxed.append(None if has_layers else _code_alone(code, context.fw_metadata, segment, len(inputs)))
            return code

        with (
            tracing(context), _without_aot_cache(), attention_at_any_length(examples),
            inductor_config.patch(INDUCTOR_OPTIONS), torch.no_grad(),
        ):  # fmt: skip
            compiled = compile_fx(segment, list(examples), inner_compile=compile_inner)
        assert callable(compiled)
        return CompiledCall(compiled, boxed[0]) if len(boxed) == 1 and boxed[0] is not None else compiled

    return compile_segment


def _without_aot_cache() -> AbstractContextManager[object]:
    """What that cache returns hides the code within; Inductor's own cache on disk, which saves a compiler, stays."""
    patch: AbstractContextManager[object] = functorch_config.patch(enable_autograd_cache=False)
    return patch


def _code_alone(code: Any, metadata: Any, segment: fx.GraphModule, inputs: int) -> BoxedCode | None:
    """The code that Inductor made, if AOTAutograd has nothing to do around it; else None.

    It has where an input is written behind the code and not in it, where a result shares memory with an input, where
    inputs were added or taken together, and where gradients are switched on or off. (That an input which the code
    writes has another version then, nobody asks of the accelerator's values.) ``metadata`` is its
    ``ViewAndMutationMeta``. Both are torch's own affair: where another version keeps them otherwise, segments are
    called as ``compile_fx`` returns them.
    """
    try:
        from torch._functorch._aot_autograd.schemas import MutationType, OutputType
        from torch._inductor.output_code import CompiledFxGraph

        handled_by_nobody = (OutputType.non_alias, OutputType.unsafe_view_alias)
        in_the_code = (MutationType.NOT_MUTATED, MutationType.MUTATED_IN_GRAPH)
        (results,) = segment.graph.output_node().args
        is_all = (
            isinstance(code, CompiledFxGraph)
            and isinstance(results, tuple)
            and inputs == len(segment.graph.find_nodes(op="placeholder"))
            and len(metadata.output_info) == len(results)
            and all(output.output_type in handled_by_nobody for output in metadata.output_info)
            and not any(given.mutates_metadata for given in metadata.input_info)
            and all(given.mutation_type in in_the_code for given in metadata.input_info)
            and not (metadata.num_mutated_inp_runtime_indices or metadata.num_intermediate_bases or metadata.tokens)
            and not (metadata.is_rng_op_functionalized or getattr(metadata, "act_input_indices", None))
            and metadata.grad_enabled_mutation is None
        )
        return code.current_callable if is_all else None
    except (ImportError, AttributeError) as error:
        logger.info("segments are called through all of torch's layers: %s", error)
        return None


def plain_compiler(mode: FakeTensorMode) -> SegmentCompiler:
    """Run the segment as plain FX code."""
    del mode

    def compile_segment(segment: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        del examples
        forward: Callable[..., Any] = segment.forward
        return forward

    return compile_segment
