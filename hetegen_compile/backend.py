"""The torch.compile backend: from what Dynamo hands over to a callable, and errors that reach the user."""

from __future__ import annotations

import copy
import functools
import logging
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._subclasses.fake_tensor import FakeTensorMode

from hetegen_compile.accelerators import uses_cuda
from hetegen_compile.compiled import CompiledGraph, HostGraph
from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.errors import (
    CompilationError,
    GradientsNotSupportedError,
    HetegenError,
    OptionError,
    chain_of,
    drop_frames,
    first_line,
)
from hetegen_compile.graph_inputs import model_weights
from hetegen_compile.hardware import profile_for
from hetegen_compile.heap import large_heap
from hetegen_compile.options import Options, parse_options
from hetegen_compile.passes.capture import capture, other_layout
from hetegen_compile.passes.context import HostOnlyGraphError, SegmentCompiler
from hetegen_compile.passes.lift_parts import lift_parts
from hetegen_compile.passes.tensors import tensors_in
from hetegen_compile.runtime import Runtime, runtime_for
from hetegen_compile.steps.segments import inductor_compiler

logger = logging.getLogger("hetegen_compile")

_RECOMPILE_LIMIT = 64
_REASON_CHARACTERS = 2000  # torch's messages may hold the whole graph; the cause that is kept has all of it


class Backend(Protocol):
    """What torch.compile calls, and what ``torch._dynamo.reset()`` tells."""

    reset: Callable[[], None]

    def __call__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        options: Mapping[str, object] | None = None,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        """A callable with the graph's inputs and outputs."""


def make_backend(compiler: Callable[[FakeTensorMode], SegmentCompiler]) -> Backend:
    """A backend whose segments are compiled by ``compiler`` (a fake mode -> a segment compiler).

    It is a function and no object of a class: a compiled model that is deep-copied refers to the same one.
    """
    graphs: weakref.WeakSet[CompiledGraph | HostGraph] = weakref.WeakSet()

    def backend(
        module: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        options: Mapping[str, object] | None = None,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        """A callable with the graph's inputs and outputs.

        If something is wrong, it raises a ``HetegenError`` when it is called: an error raised here would be taken for
        a graph break and the model would run in eager.
        """
        _raise_recompile_limit()
        _ask_for_resets(made)
        try:
            if mode is not None:  # torch hands over any but "default"
                raise OptionError(f"mode={mode!r} is Inductor's: leave it out; hetegen is tuned by options={{...}}")
            parsed = parse_options(options)
            graph = _compile(module, inputs, parsed, compiler)
        except HostOnlyGraphError as why:
            graph = HostGraph(module, parsed, str(why))
        except TensorifyScalarRestartAnalysis:
            raise
        except HetegenError as error:
            return _raising(error)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            wrapped = CompilationError(f"hetegen could not compile this graph: {reason[:_REASON_CHARACTERS]}")
            wrapped.__cause__ = error
            return _raising(wrapped)
        graphs.add(graph)
        return graph

    def reset() -> None:
        """Let go of accelerators: Dynamo keeps some graphs for ever (of functions inlined up to a graph break)."""
        for graph in list(graphs):
            graph.release()

    made = cast(Backend, backend)
    made.reset = reset
    return made


hetegen = make_backend(inductor_compiler)
"""The backend behind ``torch.compile(model, backend="hetegen", options={...})``."""


def _compile(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    compiler: Callable[[FakeTensorMode], SegmentCompiler],
) -> CompiledGraph | HostGraph:
    _refuse_gradients(module)
    uses_cuda(options.accelerator, pace=options.pace, seed=options.seed)  # what is wrong is told before measuring
    profile = profile_for(options)
    open_runtime = functools.partial(runtime_for, options, profile)
    return compile_graph(module, inputs, compiler, options=options, profile=profile, open_runtime=open_runtime)


def compile_graph(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    compiler: Callable[[FakeTensorMode], SegmentCompiler],
    *,
    options: Options,
    profile: HardwareProfile,
    open_runtime: Callable[[], Runtime],
) -> CompiledGraph | HostGraph:
    """A callable for one of Dynamo's graphs, planned for ``inputs``, on the runtime that ``open_runtime`` gives.

    A graph that makes nested or sparse tensors on the way runs on the host if it cannot be compiled.
    """
    strange = other_layout(module.graph.nodes)
    untouched = None if strange is None else _as_it_is(module)
    with large_heap():
        try:
            mode = capture(module, inputs)
            lifted, parts = lift_parts(module, inputs, model_weights(module, inputs), mode)
            return CompiledGraph(
                lifted, inputs, options=options, profile=profile, open_runtime=open_runtime,
                compile_segment=compiler(mode), parts=parts,
            )  # fmt: skip
        except (HetegenError, HostOnlyGraphError, TensorifyScalarRestartAnalysis):
            raise
        except Exception as error:
            if untouched is None:
                raise
            return HostGraph(untouched, options, f"{strange}, and it could not be compiled: {first_line(error)}")


def _as_it_is(module: fx.GraphModule) -> fx.GraphModule:
    """A graph that stays as Dynamo handed it over, whatever is made of ``module``."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


def _ask_for_resets(backend: Backend) -> None:
    """Let Dynamo tell this backend of its next reset.

    It tells those that were handed to ``torch.compile`` since the last one: not the backend of a model that lives on,
    whose graphs it makes anew, and not one inside a function of the user's.
    """
    torch._dynamo.eval_frame.cached_backends.setdefault(id(backend), backend)


def _raise_recompile_limit() -> None:
    """Dynamo counts compilations per code object, and all transformers models share one wrapper."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _RECOMPILE_LIMIT)


def _refuse_gradients(module: fx.GraphModule) -> None:
    if not torch.is_grad_enabled():
        return
    output = module.graph.output_node()
    examples = [node.meta.get("example_value") for node in output.all_input_nodes]
    if any(tensor.requires_grad for tensor in tensors_in(examples)):
        raise GradientsNotSupportedError(
            "gradients are enabled and this forward's result would require them; hetegen runs inference only: "
            "call the model under torch.no_grad() or torch.inference_mode(), or use model.generate()"
        )


def _raising(error: HetegenError) -> Callable[..., Any]:
    """A callable that raises a copy of ``error`` each time, so that no call's frames (and tensors) stay with it.

    Of the frames of its causes the text is kept.
    """
    logger.error("%s", error)
    logger.debug("where it was raised", exc_info=error)
    for cause in chain_of(error)[1:]:
        cause.add_note("raised at\n" + "".join(traceback.format_tb(cause.__traceback__)))
    drop_frames(error)

    def fail(*args: Tensor) -> Any:
        raise copy.copy(error) from error.__cause__

    return fail
