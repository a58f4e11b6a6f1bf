"""What has been launched at which sizes: behind a closed gate nothing may run for the first time at its sizes.

It may load code, for which a GPU's driver waits for all that was issued, and so for the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from hetegen_compile.accelerators.base import Op
from hetegen_compile.errors import ScheduleError

Sizes = tuple[torch.Size, ...]


class LoadedCode:
    """The sizes at which each operation has last run. Used by the compute stream's thread only."""

    def __init__(self) -> None:
        self._sizes: WeakKeyDictionary[Callable[..., Any], dict[str, Sizes]] = WeakKeyDictionary()

    def launch(self, op: Op, function: Callable[..., Any], tensors: Iterable[torch.Tensor], *, gated: bool) -> None:
        """Note a launch; raises ScheduleError if it is the first at its sizes and a gate may be closed.

        Methods of torch's own types are nothing that a compiled graph launches by themselves, and are passed over.
        """
        if not type(function).__weakrefoffset__:
            return
        known, sizes = self._sizes.setdefault(function, {}), tuple(tensor.shape for tensor in tensors)
        if gated and known.get(op.name) != sizes:
            raise ScheduleError(
                f"{op.name} runs for the first time at sizes {[tuple(size) for size in sizes]} while a gate may be "
                f"closed (last time: {known.get(op.name)}): the driver may load code for it and wait for the gate"
            )
        known[op.name] = sizes


__all__ = ["LoadedCode"]
