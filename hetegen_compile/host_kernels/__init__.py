"""How the host computes its part of a Linear: one registry, used by calibration and by the runtime alike.

``kernels`` names the ways, ``vectorised`` is the one of our own, ``choose`` picks per call what a profile recorded.
"""

from hetegen_compile.host_kernels.choose import HostLinear, bind_kernels
from hetegen_compile.host_kernels.kernels import (
    INT8PACK,
    KERNELS,
    LINEAR,
    TILED,
    VECTORISED,
    HostKernel,
    kernels_for,
)

__all__ = [
    "INT8PACK",
    "KERNELS",
    "LINEAR",
    "TILED",
    "VECTORISED",
    "HostKernel",
    "HostLinear",
    "bind_kernels",
    "kernels_for",
]
