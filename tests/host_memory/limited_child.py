"""A process that may allocate less than its model has weights: ``python -m tests.host_memory.limited_child FILE``.

Prints, as JSON, what the test looks at.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

import hetegen_compile
from hetegen_compile.backend import make_backend
from hetegen_compile.runtime import live_runtimes
from hetegen_compile.steps.segments import plain_compiler
from tests.backend.modules import Mlp, random

LAYERS, WIDTH = 10, 2048
ALLOWED_BYTES = 96 << 20
OPTIONS: dict[str, Any] = {
    "accelerator": "emulated", "gpu_memory": "16MiB", "split": 0.25, "seed": 5, "print_schedule": False
}  # fmt: skip


def main(file: str) -> None:
    """Map the model, limit the process, compile, run and compare."""
    torch.set_num_threads(1)
    _run(Mlp(2).eval(), random(2, 64), "24KiB")  # imports and threads come before the limit
    model = mapped_model(file)
    x = random(2, WIDTH)
    with torch.no_grad():
        expected = model(x)
    _allow_more(ALLOWED_BYTES)
    before = _status_bytes("RssAnon")
    result = _run(model, x, "16MiB")
    schedule = hetegen_compile.schedules()[-1]
    print(
        json.dumps(
            {
                "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
                "allocation_fails": _fails_to_allocate(LAYERS * WIDTH * WIDTH * 4),
                "difference": float((result - expected).abs().max()),
                "norm": float(expected.abs().max()),
                "anonymous_bytes": _status_bytes("RssAnon") - before,
                "streamed_bytes": schedule.streamed_bytes,
                "host_bytes": schedule.host_bytes,
                "staged_bytes": _staged_bytes(),
                "explain": schedule.explain(),
                "mapped": file in Path("/proc/self/maps").read_text(),
            }
        )
    )


def mapped_model(file: str) -> Mlp:
    """The model with its parameters in the file's mapping and nowhere else."""
    with torch.device("meta"):
        model = Mlp(LAYERS, WIDTH).eval()
    with safe_open(file, framework="pt") as tensors:
        for name, _ in list(model.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            value = nn.Parameter(tensors.get_tensor(name), requires_grad=False)
            setattr(model.get_submodule(owner), attribute, value)
    return model


def _run(model: Mlp, x: torch.Tensor, gpu_memory: str) -> Any:
    compiled = torch.compile(model, backend=make_backend(plain_compiler), options={**OPTIONS, "gpu_memory": gpu_memory})
    with torch.no_grad():
        for _ in range(3):
            result = compiled(x)
    return result


def _staged_bytes() -> int:
    """Bytes that went through pinned rings so far."""
    return sum(one.accelerator.counters.staged_bytes.get("weights", 0) for one in live_runtimes())


def _allow_more(nbytes: int) -> None:
    """Limit private writable memory, the mapping of the model among it, to what there is and ``nbytes`` more."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_status_bytes("VmData") + nbytes, hard))


def _fails_to_allocate(nbytes: int) -> bool:
    try:
        torch.empty(nbytes, dtype=torch.uint8)
    except RuntimeError:
        return True
    return False


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main(sys.argv[1])
