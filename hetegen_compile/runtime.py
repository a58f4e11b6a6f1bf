"""What compiled graphs share on one accelerator: its mirrors, the step lock, and its life."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from typing import Any

from torch import nn

from hetegen_compile.accelerators import Accelerator, open_accelerator
from hetegen_compile.carried import CarriedPrefetches
from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.host_memory import HostMemory
from hetegen_compile.mirrors import Mirrors
from hetegen_compile.options import Options
from hetegen_compile.residency import ResidencyLedger

_open: weakref.WeakValueDictionary[Any, Runtime] = weakref.WeakValueDictionary()
_opening = threading.Lock()


def _after_fork() -> None:
    """In the child: locks that another thread held at the fork would stay locked for good."""
    global _opening
    _opening = threading.Lock()
    for runtime in list(_open.values()):
        runtime.lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


class Runtime:
    """One accelerator in use. Graphs with the same accelerator options share it; it closes with the last."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.mirrors = Mirrors(accelerator)
        self.carried = CarriedPrefetches(accelerator)
        self.ledger = ResidencyLedger(self.mirrors)
        self.host_memory = HostMemory(accelerator.pin, moved=self.ledger.storages_moved)
        self.lock = threading.RLock()
        self.limit_bytes = accelerator.memory_bytes
        self._ring_bytes = 0
        weakref.finalize(self, accelerator.close)

    def reserve(self, ring_bytes: int) -> None:
        """Make the staging ring that all graphs share as long as the ledger says."""
        if ring_bytes != self._ring_bytes:
            self.carried.drop("the staging ring is made anew")  # they would keep the old one
        self.accelerator.reserve_ring(ring_bytes)
        self._ring_bytes = ring_bytes

    def lower_limit(self, budget_bytes: int) -> int:
        """The accelerator ran out of memory within a budget: count on less from now on; the new limit.

        That is what the accelerator says it has, or seven eighths of the budget if it says to have more.
        """
        self.limit_bytes = min(self.accelerator.available_bytes(), budget_bytes * 7 // 8)
        self.ledger.epoch += 1
        return self.limit_bytes


def runtime_for(options: Options, profile: HardwareProfile) -> Runtime:
    """The runtime that these options ask for; made on first use.

    Raises:
        AcceleratorUnavailableError: ``accelerator="cuda"`` on a machine without a device.
    """
    key = (options.accelerator, options.pace, options.seed, profile.accelerator.memory_bytes)
    with _opening:
        runtime = _open.get(key)
        if runtime is None or not runtime.accelerator.usable:
            runtime = Runtime(
                open_accelerator(
                    options.accelerator,
                    memory_bytes=profile.accelerator.memory_bytes,
                    pace=options.pace,
                    seed=options.seed,
                )
            )
            _open[key] = runtime
    return runtime


def live_runtimes() -> list[Runtime]:
    """All runtimes that some compiled graph still uses."""
    return list(_open.values())


def refresh(model: nn.Module) -> None:
    """Upload what the accelerator holds of ``model`` again before it is next used.

    That includes what has been prefetched for the next step. Needed after writes that leave a tensor's version as it
    was: through ``.data`` (``p.data += d``), through a numpy view, by a fused optimiser. Assigning
    ``p.data = other`` or ``copy_`` under ``no_grad`` is noticed.
    """
    for runtime in live_runtimes():
        with runtime.lock:
            runtime.carried.drop("refresh")
            runtime.mirrors.forget(itertools.chain(model.parameters(), model.buffers()))
