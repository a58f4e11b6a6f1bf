"""Measuring this machine: the hardware profile behind ``hardware="auto"`` and ``hetegen calibrate``.

``machine`` says what the machine is, ``host``, ``kernels`` and ``cuda`` measure it, ``runner`` makes a
profile of the figures, ``report`` shows it, ``cache`` keeps it for other processes.
"""

from hetegen_compile.calibration.cache import cache_path, read_profile, write_profile
from hetegen_compile.calibration.linears import seems_disturbed
from hetegen_compile.calibration.machine import Machine, this_machine
from hetegen_compile.calibration.runner import calibrate
from hetegen_compile.calibration.timing import Effort

__all__ = [
    "Effort",
    "Machine",
    "cache_path",
    "calibrate",
    "read_profile",
    "seems_disturbed",
    "this_machine",
    "write_profile",
]
