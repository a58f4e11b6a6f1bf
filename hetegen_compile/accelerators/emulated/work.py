"""What the threads of the emulated accelerator do: copies, launches and counting what they make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from hetegen_compile.accelerators.base import Op
from hetegen_compile.accelerators.emulated.aliases import AliasChecks
from hetegen_compile.accelerators.emulated.clocks import Access, Clock
from hetegen_compile.accelerators.emulated.loaded import LoadedCode
from hetegen_compile.accelerators.emulated.values import UNFINISHED, DeviceTensor, Transfer, deferred_in
from hetegen_compile.accelerators.geometry import copy_span, empty_result, empty_twin, span_bytes
from hetegen_compile.accelerators.growing import Block, empty_cache, lengthened
from hetegen_compile.accelerators.ledger import MemoryLedger
from hetegen_compile.linear_parts import usual_strides

HOST_DEVICE = torch.device("cpu")

Issued = tuple[Access, Clock]
"""An operation and what its stream knew when it was issued."""


class Call(NamedTuple):
    """One launch: a function, its arguments, those of them it writes, and the futures of its results.

    ``gated``: it is issued while a gate may be closed.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    written: tuple[Any, ...]
    results: list[DeviceTensor]
    single: bool
    gated: bool = False


class DeviceWork:
    """Runs on the streams' threads only; raises what the operation raises."""

    def __init__(self, ledger: MemoryLedger) -> None:
        self._ledger = ledger
        self.aliases = AliasChecks()
        self._loaded = LoadedCode()

    def copy_up(self, op: Op, value: DeviceTensor, source: torch.Tensor) -> None:
        """Allocate a device tensor and fill it from a host tensor."""
        self._ledger.require(op.name, span_bytes(source))
        twin = empty_twin(source, HOST_DEVICE)
        self._ledger.hold(twin, op.category)
        copy_span(twin, source)
        value.data = twin
        self._ledger.uploaded(op.category, span_bytes(source))

    def copy_all_up(self, op: Op, values: Sequence[DeviceTensor], sources: Sequence[torch.Tensor]) -> None:
        """What one transfer brings: a device tensor for each host tensor."""
        for value, source in zip(values, sources, strict=True):
            self.copy_up(op, value, source)

    def overwrite(self, op: Op, value: DeviceTensor, source: torch.Tensor, issued: Issued) -> None:
        """Fill an earlier device tensor of the same geometry."""
        self.aliases.write(value.tensor(), *issued)
        copy_span(value.tensor(), source)
        self._ledger.uploaded(op.category, span_bytes(source))

    def fill_slot(self, op: Op, value: DeviceTensor, source: torch.Tensor, view: torch.Tensor) -> None:
        """Copy rows of a weight into the staging ring."""
        view.copy_(source)
        value.data = view
        self._ledger.uploaded(op.category, span_bytes(view))

    def fill_pinned(self, op: Op, source: torch.Tensor, view: torch.Tensor) -> None:
        """Copy rows of a weight into the pinned ring."""
        view.copy_(source)
        self._ledger.staged(op.category, span_bytes(view))

    def copy_down(self, op: Op, values: Sequence[DeviceTensor], transfer: Transfer) -> None:
        """Allocate host tensors and fill them from device tensors."""
        results = []
        for value in values:
            source = value.tensor()
            self.aliases.read(source, transfer.access, transfer.clock)
            result = empty_result(source)
            copy_span(result, source)
            results.append(result)
            self._ledger.downloaded(op.category, span_bytes(source))
        transfer.host_tensors = results

    def new_cache(self, op: Op, value: DeviceTensor, like: torch.Tensor, block: Block) -> None:
        """Allocate a block; nothing of it is valid yet."""
        self._ledger.require(op.name, block.nbytes)
        value.data = empty_cache(like, block.tokens, HOST_DEVICE)
        self._ledger.hold(value.data, op.category)

    def call(self, op: Op, call: Call, issued: Issued) -> None:
        """Run a launch's function on the finished arguments and finish its results.

        Results and workspace are there at the same time, and refused afterwards if they do not fit.
        """
        self._ledger.require(op.name, op.workspace_bytes)
        for value in deferred_in(call.written):
            if isinstance(value, DeviceTensor):
                self.aliases.write(value.tensor(), *issued)
        arguments = [_resolve(argument) for argument in call.args]
        if call.single:
            arguments = [usual_strides(one) if isinstance(one, torch.Tensor) else one for one in arguments]
        self._loaded.launch(op, call.function, _tensors_in(arguments), gated=call.gated)
        returned = call.function(*arguments)
        for value, data in zip(call.results, [returned] if call.single else returned, strict=True):
            value.data = data
            if isinstance(data, torch.Tensor):
                self._ledger.hold(data, "activations")
        self._ledger.note_workspace(op.name, op.workspace_bytes)


def lengthened_and_poisoned(cache: torch.Tensor, tokens: int) -> torch.Tensor:
    """A longer cache, with NaN in what a launch has to write."""
    result = lengthened(cache, tokens)
    if result.is_floating_point():
        result[:, :, cache.shape[-2] :].fill_(torch.nan)
    return result


def _tensors_in(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors_in(argument)


def _resolve(argument: Any) -> Any:
    """What lies behind the values of an argument."""
    kind = type(argument)
    if kind is DeviceTensor:
        return argument.tensor() if argument.data is UNFINISHED else argument.data
    if kind is list or kind is tuple:
        return kind(_resolve(item) for item in argument)
    return argument
