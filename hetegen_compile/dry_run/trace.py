"""Dynamo's graphs of one forward on fakes, without leaving anything in Dynamo."""

from __future__ import annotations

import contextlib
import logging
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx, nn
from torch._C._dynamo import eval_frame
from torch._dynamo import convert_frame, pgo
from torch._dynamo.exc import BackendCompilerFailed, TensorifyScalarRestartAnalysis
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import _disable_current_modes

from hetegen_compile.dry_run.fakes import Fakes
from hetegen_compile.errors import UnsupportedModelError
from hetegen_compile.graph_inputs import as_int, model_weights, symbol_inputs
from hetegen_compile.passes.capture import capture
from hetegen_compile.passes.context import ON_HOST, HostOnlyGraphError
from hetegen_compile.passes.lift_parts import lift_parts, with_parts
from hetegen_compile.planning.planned import Sizes

logger = logging.getLogger("hetegen_compile")

_RECOMPILE_LIMIT = 64


@dataclass(frozen=True)
class TracedGraph:
    """One captured graph of a forward.

    Attributes:
        module: the graph, annotated by ``capture``.
        weights: the model's tensors (fakes) by the names of their placeholders.
        sizes: the symbols' values in this forward.
    """

    module: fx.GraphModule
    weights: Mapping[str, Tensor]
    sizes: Sizes

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's tensors that the graph reads."""
        return sum({id(t): int(t.numel()) * t.element_size() for t in self.weights.values()}.values())


class TracedForward(NamedTuple):
    """A forward's graphs, in the order in which they are met, and its result."""

    graphs: list[TracedGraph]
    result: Any


def trace(model: nn.Module, fakes: Fakes, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TracedForward:
    """The graphs that Dynamo captures of ``model(*args, **kwargs)``, and what it returns (fakes).

    ``model``, ``args`` and ``kwargs`` are copies with fakes. Nothing is computed. Whatever Dynamo keeps of other
    models and calls (compiled code, sizes seen, limits) is as before when this returns.

    Raises:
        UnsupportedModelError: the forward needs a value that only a run could tell, or no graph was captured.
    """
    graphs: list[TracedGraph] = []
    errors: list[Exception] = []

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            graphs.append(_captured(module, inputs))
        except TensorifyScalarRestartAnalysis:
            raise
        except Exception as error:  # raised below: Dynamo would wrap it, or take it for a graph break
            errors.append(error)
        return module.forward

    with _no_traces_left(backend), _disable_current_modes(), torch.no_grad(), fakes.mode:
        try:
            result = torch.compile(_fresh_caller(), backend=backend)(model, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            errors.append(_needs_values(error))
        except BackendCompilerFailed as error:
            errors.append(error.inner_exception)
    if errors and isinstance(errors[0], HostOnlyGraphError):
        raise nothing_to_plan(errors[0]) from errors[0]
    if errors:
        raise errors[0]
    if not graphs:
        raise UnsupportedModelError(
            "no graph was captured of this forward: it has to compute with tensors, and a module of torch itself "
            "(nn.Linear, nn.Sequential) has to be inside a module of your own"
        )
    return TracedForward(graphs, result)


def nothing_to_plan(reason: HostOnlyGraphError) -> UnsupportedModelError:
    """The error of a plan for a graph that is not offloaded."""
    return UnsupportedModelError(f"there is nothing to plan: the graph {ON_HOST}: {reason}")


def _captured(module: fx.GraphModule, inputs: Sequence[Any]) -> TracedGraph:
    mode = capture(module, inputs)
    lifted, parts = lift_parts(module, inputs, model_weights(module, inputs), mode)
    inputs, placeholders = with_parts(inputs, parts), lifted.graph.find_nodes(op="placeholder")
    sizes = {symbol: sympy.Integer(as_int(inputs[i])) for symbol, i in symbol_inputs(placeholders).items()}
    return TracedGraph(lifted, model_weights(lifted, inputs), sizes)


def _needs_values(error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"this forward reads a value that only a run can tell ({error}), so it cannot be planned without running; "
        "pass what it is computed from as a Python number, or leave out the argument that makes the model look (an "
        "attention mask of ones, a static cache)"
    )


# ---- Dynamo as it was --------------------------------------------------------------------------------------------


def _call(self: Any, args: Any, kwargs: Any) -> Any:
    return self(*args, **kwargs)  # "self": sources read as they do in the module's own forward


def _fresh_caller() -> Callable[..., Any]:
    """``_call`` with a code object of its own: Dynamo keeps what it compiles on code objects."""
    return types.FunctionType(_call.__code__.replace(), globals())


@contextlib.contextmanager
def _no_traces_left(backend: Callable[..., Any]) -> Iterator[None]:
    """Dynamo's caches, automatic dynamic sizes and limits as before, whatever is compiled inside."""
    codes: list[types.CodeType] = []
    hook = convert_frame.register_bytecode_hook(lambda code, _: codes.append(code))
    sizes_seen, pgo._CODE_STATE = pgo._CODE_STATE, defaultdict(pgo.CodeState)
    limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    try:
        with torch._dynamo.config.patch(recompile_limit=limit, suppress_errors=False):
            yield
    finally:
        pgo._CODE_STATE = sizes_seen
        hook.remove()
        for code in codes:
            _drop_entries(code, backend)


def _drop_entries(code: types.CodeType, backend: Callable[..., Any]) -> None:
    """Remove what was compiled with ``backend`` from a code object; what others compiled stays."""
    entries = eval_frame._debug_get_cache_entry_list(code)
    ours = [entry for entry in entries if _is(entry.backend, backend)]
    if len(ours) == len(entries):
        eval_frame.reset_code(code)
        return
    for entry in ours:
        state = entry.guard_manager.extra_state
        if state is not None:
            state.invalidate(entry, DeletedGuardManagerWrapper("made by a dry run of hetegen"))


def _is(found: Any, backend: Callable[..., Any]) -> bool:
    """Whether a cache entry's backend is ``backend``, which torch.compile wraps."""
    return getattr(found, "compiler_fn", found) is backend
