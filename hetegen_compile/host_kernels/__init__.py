"""How the host computes its part of a Linear: one registry, used by calibration and by the runtime alike.

``kernels`` names the ways, ``vectorised`` is the one of our own, ``choose`` picks per call what a profile recorded, and
``experts`` computes products with a mixture's experts so.
"""

from hetegen_compile.host_kernels.choose import HostLinear, bind_kernels
from hetegen_compile.host_kernels.experts import HostExperts, bind_experts
from hetegen_compile.host_kernels.kernels import (
    INT8PACK,
    KERNELS,
    LINEAR,
    TILED,
    TILED_THROUGH_L2,
    VECTORISED,
    HostKernel,
    kernels_for,
)

__all__ = [
    "INT8PACK",
    "KERNELS",
    "LINEAR",
    "TILED",
    "TILED_THROUGH_L2",
    "VECTORISED",
    "HostExperts",
    "HostKernel",
    "HostLinear",
    "bind_experts",
    "bind_kernels",
    "kernels_for",
]
