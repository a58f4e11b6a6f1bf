"""The modes of torch that plans are made and steps are run in, whatever the caller's are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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


__all__ = ["quiet"]
