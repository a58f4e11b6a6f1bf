"""Stage ``environment``: versions, processor, memory and its limits, the device, its driver and its copy engines."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from benchmarks.children import Notebook
from benchmarks.gpu.settings import Settings
from hetegen_compile.calibration import this_machine
from hetegen_compile.host_memory.limits import read_limits
from hetegen_compile.system import (
    last_level_cache_bytes,
    memory_limit_bytes,
    numa_nodes,
    physical_memory_bytes,
    usable_cpus,
)

PACKAGES = ("torch", "transformers", "triton", "numpy", "accelerate", "diffusers", "sympy", "networkx")

ATTRIBUTES = {
    "copy engines": 40,
    "can map host memory": 19,
    "unified addressing": 41,
    "pageable memory access": 88,
    "registered memory has the host's addresses": 91,
    "host registration supported": 99,
    "read-only host registration supported": 113,
    "64-bit stream memory operations": 122,
}
"""Numbers of ``CUdevice_attribute`` in cuda.h."""

_SMI = "name,driver_version,pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,clocks.max.sm,compute_mode"


def environment(settings: Settings, notebook: Notebook) -> None:
    """Note what the run stands on."""
    notebook.note("hardware", hardware_line(settings))
    notebook.note("versions", {"python": platform.python_version(), **_versions(), "cuda": torch.version.cuda})
    notebook.note("host", _host())
    if settings.cuda:
        notebook.note("device", _device())


def hardware_line(settings: Settings) -> str:
    """One line that says where figures come from."""
    line = str(this_machine(cuda=settings.cuda))
    return line if settings.cuda else f"EMULATED, times say nothing about speed: {line}"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _host() -> dict[str, Any]:
    room = read_limits().room()
    return {
        "cpus": len(usable_cpus()),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": physical_memory_bytes(),
        "memory_limit_bytes": memory_limit_bytes(),
        "memory_left": None if room is None else str(room),
        "locked_memory_limit": _locked_limit(),
        "nodes": len(numa_nodes(usable_cpus())),
    }


def _locked_limit() -> int:
    import resource

    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]


def _device() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info()
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "processors": properties.multi_processor_count,
        "free_bytes": free,
        "total_bytes": total,
        "allocator": torch.cuda.get_allocator_backend(),
        "allocator_settings": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF"),
        **_driver(),
        "nvidia-smi": _smi(),
    }


def _driver() -> dict[str, Any]:
    """What torch does not tell, asked of the driver's library."""
    driver = ctypes.CDLL("libcuda.so.1")
    value, device = ctypes.c_int(), ctypes.c_int(torch.cuda.current_device())
    found: dict[str, Any] = {}
    code = driver.cuDriverGetVersion(ctypes.byref(value))
    found["driver's CUDA"] = value.value if code == 0 else f"error {code}"
    for name, number in ATTRIBUTES.items():
        code = driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        found[name] = value.value if code == 0 else f"error {code}"
    return found


def _smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "not on the path"
    command = [program, f"--query-gpu={_SMI}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return (done.stdout or done.stderr).strip()
