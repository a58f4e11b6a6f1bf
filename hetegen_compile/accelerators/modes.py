"""The caller's modes of torch (gradients, inference, CPU autocast, below autograd), re-entered by a worker thread.

All are per thread: a worker that does not re-enter them computes in fp32 what its caller autocasts.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

import torch


class Modes(NamedTuple):
    """The thread-local state of torch that decides what an operation computes."""

    grad: bool
    inference: bool
    autocast: bool
    autocast_dtype: torch.dtype
    below_autograd: bool = False

    @classmethod
    def current(cls) -> Modes:
        """The calling thread's state."""
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch._C._dispatch_tls_local_exclude_set().has(torch._C.DispatchKey.AutogradFunctionality),
        )


COPY_MODES = Modes(False, False, False, torch.bfloat16)
"""For copies: no graph is recorded, and the tensors made are ordinary ones, not inference tensors."""


class EnteredModes:
    """The state that the owning thread is in; changes it only when the next operation needs another.

    The thread has to ``leave`` before it ends: torch's guards restore what they saved when they are destroyed, whatever
    thread that happens on, and a traceback may keep them until the garbage collector runs on the caller's.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._modes: Modes | None = None

    def enter(self, modes: Modes) -> None:
        """Put the calling thread into ``modes`` (until the next call)."""
        if modes == self._modes:
            return
        self._modes = None
        self._stack.close()
        self._stack.enter_context(torch.inference_mode(modes.inference))
        self._stack.enter_context(torch.set_grad_enabled(modes.grad))
        if modes.below_autograd:
            self._stack.enter_context(torch._C._AutoDispatchBelowAutograd())
        if modes.autocast:
            # the cache of casts would outlive in-place updates of what it cast
            dtype = modes.autocast_dtype
            self._stack.enter_context(torch.autocast("cpu", dtype=dtype, cache_enabled=False))
        self._modes = modes

    def leave(self) -> None:
        """Put the calling thread into the state that it had at first."""
        self._modes = None
        self._stack.close()
