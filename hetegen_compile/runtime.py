"""What compiled graphs share on one accelerator: its mirrors, the step lock, and its life."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hetegen_compile.accelerators import Accelerator, open_accelerator, uses_cuda
from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.errors import OptionError
from hetegen_compile.host_memory import HostMemory, HugePages
from hetegen_compile.mirrors import Mirrors
from hetegen_compile.model_lives import ModelLives
from hetegen_compile.options import Options
from hetegen_compile.residency import ResidencyLedger
from hetegen_compile.steps.carried import CarriedPrefetches

logger = logging.getLogger("hetegen_compile")

_open: weakref.WeakValueDictionary[Any, Runtime] = weakref.WeakValueDictionary()
_opening = threading.Lock()


def _after_fork() -> None:
    """In the child: locks that another thread held at the fork would stay locked for good."""
    global _opening
    _opening = threading.Lock()
    for runtime in live_runtimes():
        runtime.lives.lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


class Runtime:
    """One accelerator in use. Graphs with the same accelerator options share it; it closes with the last."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.mirrors = Mirrors(accelerator)
        self.carried = CarriedPrefetches(accelerator)
        self.ledger = ResidencyLedger(self.mirrors)
        self.lives = ModelLives(self.mirrors, self.rest)
        moved = functools.partial(_note_moves, self.ledger, self.lives)
        huge_pages = HugePages() if accelerator.kind == "cuda" else None
        self.host_memory = HostMemory(accelerator.pin, moved=moved, huge_pages=huge_pages)
        self.limit_bytes = accelerator.memory_bytes
        self._ring_bytes = 0
        weakref.finalize(self, accelerator.close)

    @property
    def lock(self) -> threading.RLock:
        """Held during a step."""
        return self.lives.lock

    def reserve(self, ring_bytes: int, limit_bytes: int) -> None:
        """Make the staging ring that all graphs share as long as the ledger says.

        Mirrors that no plan keeps leave for it: both have to fit ``limit_bytes``, which may be less than before.
        """
        if ring_bytes != self._ring_bytes:
            self.carried.drop("the staging ring is made anew")  # they would keep the old one
        self.mirrors.make_room(limit_bytes - ring_bytes)
        self.accelerator.reserve_ring(ring_bytes)
        self._ring_bytes = ring_bytes

    def rest(self) -> None:
        """No model needs the accelerator for now: it keeps no mirrors, slots and threads until one does."""
        self.carried.drop("no model is left")
        self.mirrors.forget()
        self.accelerator.rest()
        self._ring_bytes = self.ledger.ring_bytes = 0

    def lower_limit(self, budget_bytes: int) -> int:
        """The accelerator ran out of memory within a budget: count on less from now on; the new limit.

        That is what the accelerator says it has, or seven eighths of the budget if it says to have more.
        """
        self.limit_bytes = min(self.accelerator.available_bytes(), budget_bytes * 7 // 8)
        self.ledger.epoch += 1
        return self.limit_bytes


def _note_moves(ledger: ResidencyLedger, lives: ModelLives, places: Mapping[int, int]) -> None:
    """Storages were adopted; this is no method of the runtime, which must not hold itself."""
    ledger.storages_moved(places)
    lives.storages_moved(places)


def runtime_for(options: Options, profile: HardwareProfile) -> Runtime:
    """The runtime that these options ask for; made on first use.

    A CUDA device has one, whatever the profiles say of it. An emulated accelerator plays the machine of a profile, at a
    pace and with delays: another one of these is another machine.

    Raises:
        AcceleratorUnavailableError: ``accelerator="cuda"`` on a machine without a device.
    """
    pace, seed = options.pace, options.seed
    cuda = uses_cuda(options.accelerator, pace=pace, seed=seed)
    key = ("cuda", torch.cuda.current_device()) if cuda else ("emulated", profile, pace, seed)
    with _opening:
        runtime = _open.get(key)
        if runtime is None or not runtime.accelerator.usable:
            available_bytes = None if cuda else profile.accelerator.memory_bytes
            opened = open_accelerator(options.accelerator, memory_bytes=available_bytes, pace=pace, seed=seed)
            runtime = _open[key] = Runtime(opened)
    return runtime


def live_runtimes() -> list[Runtime]:
    """All runtimes that some compiled graph still uses."""
    return [runtime for reference in _open.valuerefs() if (runtime := reference()) is not None]


def refresh(model: nn.Module) -> None:
    """Upload what the accelerator holds of ``model`` again before it is next used.

    That includes what has been prefetched for the next step. Needed after writes that leave a tensor's version as it
    was: through ``.data`` (``p.data += d``), through a numpy view, by a fused optimiser. Assigning
    ``p.data = other`` or ``copy_`` under ``no_grad`` is noticed.

    A part of a model will do. Where no accelerator is known to hold anything of ``model``, as before its first call,
    there is nothing to upload: a warning is logged, since another object may have been meant.

    Raises:
        OptionError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"refresh expects the model that was compiled, an nn.Module: {type(model).__name__} is none")
    served = [runtime.lives.exclusively(functools.partial(_refresh, runtime, model)) for runtime in live_runtimes()]
    if not any(served):
        logger.warning(
            "refresh: no accelerator is known to hold anything of this %s, so nothing will be uploaded again; is it "
            "the model that was compiled?", type(model).__name__,
        )  # fmt: skip


def _refresh(runtime: Runtime, model: nn.Module) -> bool:
    """Whether a graph was planned with some of the model's tensors, or the accelerator holds something of them."""
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    known = runtime.lives.watches(tensors) or runtime.mirrors.hold(tensors)
    runtime.carried.drop("refresh")
    runtime.mirrors.forget(tensors)
    return known
