"""Hooks of other projects; each raises ModuleNotFoundError where the project is not installed."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.compare.job import Job

_RESERVE_BYTES = 256 << 20
"""Of the limit, left to activations and workspaces by a device map, which counts weights only."""


def accelerate_offload(model: Any, job: Job) -> None:
    """Every weight is copied when its module is called; ``state_dict`` keeps the host's tensors as they are."""
    del job
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cuda", 0), state_dict=model.state_dict())


def accelerate_map(model: Any, job: Job) -> None:
    """Modules on the device up to the limit, the others offloaded as ``accelerate_offload`` does."""
    from accelerate import dispatch_model, infer_auto_device_map

    assert job.gpu_memory is not None, "a device map is made for a limit"
    limits = {0: max(job.gpu_memory - _RESERVE_BYTES, 1), "cpu": 1 << 50}
    split = getattr(model, "_no_split_modules", None)
    device_map = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=sorted(split or []))
    dispatch_model(model, device_map, main_device=0, state_dict=model.state_dict())


def diffusers_groups(model: Any, job: Job) -> None:
    """Leaf modules go up on a stream of their own, in the order learnt in the first forward."""
    del job
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model, onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), offload_type="leaf_level",
        use_stream=True,
    )  # fmt: skip
