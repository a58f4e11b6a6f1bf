"""What compiled graphs share on one accelerator: its mirrors, the step lock, and its life."""

from __future__ import annotations

import itertools
import threading
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hetegen_compile.accelerators import Accelerator, open_accelerator
from hetegen_compile.carried import CarriedPrefetches
from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.host_memory import HostMemory
from hetegen_compile.mirrors import Mirrors
from hetegen_compile.options import Options

WEIGHTS = "weights"
"""The category under which resident weights are counted."""

_open: weakref.WeakValueDictionary[Any, Runtime] = weakref.WeakValueDictionary()
_opening = threading.Lock()


class Runtime:
    """One accelerator in use. Graphs with the same accelerator options share it; it closes with the last."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.mirrors = Mirrors(accelerator)
        self.carried = CarriedPrefetches(accelerator)
        self.host_memory = HostMemory(accelerator.pin)
        self.lock = threading.RLock()
        self.epoch = 0
        self.ring_bytes = 0
        weakref.finalize(self, accelerator.close)

    def resident_weights(self) -> ResidentWeightsView:
        """What the residency decision may know: the weights of models that still exist."""
        self.mirrors.purge()
        return ResidentWeightsView(self.mirrors)

    def reserve_ring(self, nbytes: int) -> None:
        """Make the staging ring at least this long; all graphs share it."""
        if nbytes > self.ring_bytes:
            self.carried.drop("the staging ring grows")
            self.accelerator.reserve_ring(nbytes)
            self.ring_bytes = nbytes

    def evict_weights(self) -> int:
        """Drop all resident weights; graphs that planned with them plan again. Returns the new epoch."""
        self.carried.drop("weights are evicted")
        self.accelerator.synchronize()
        self.mirrors.forget_category(WEIGHTS)
        self.epoch += 1
        return self.epoch


@dataclass(frozen=True)
class ResidentWeightsView:
    """Read-only view of the weights that lie on the accelerator."""

    mirrors: Mirrors

    def is_resident(self, weight: Tensor) -> bool:
        """Whether the weight (or the part that residency chose) is on the accelerator already."""
        return self.mirrors.held(weight, WEIGHTS)

    def held_bytes(self) -> int:
        """Bytes of all resident weights, those of other graphs included."""
        return self.mirrors.held_bytes(WEIGHTS)


def runtime_for(options: Options, profile: HardwareProfile) -> Runtime:
    """The runtime that these options ask for; made on first use.

    Raises:
        AcceleratorUnavailableError: ``accelerator="cuda"`` on a machine without a device.
    """
    key = (options.accelerator, options.pace, options.seed, profile.accelerator.memory_bytes)
    with _opening:
        runtime = _open.get(key)
        if runtime is None:
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
