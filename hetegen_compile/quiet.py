"""The modes of torch that plans are made and steps are run in, whatever the caller's are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch


@contextlib.contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """No gradients, tensors with versions, and the caller's CPU autocast on the accelerator's device too."""
    with contextlib.ExitStack() as modes, torch.set_grad_enabled(False):
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
        if device.type != "cpu" and torch.is_autocast_enabled("cpu"):
            modes.enter_context(torch.autocast(device.type, dtype=torch.get_autocast_dtype("cpu")))
        yield


def below_autograd() -> AbstractContextManager[None]:
    """Operations skip autograd's part of the dispatcher, which has nothing to do in a step and takes 1 to 2 us each.

    What writes in place still gives its tensor a new version, and views are still views to torch. To be entered for
    graphs of ``only_torchs_operations`` (``passes/operators.py``) alone: others may be registered with autograd only,
    or use it.
    """
    return torch._C._AutoDispatchBelowAutograd()


__all__ = ["below_autograd", "quiet"]
