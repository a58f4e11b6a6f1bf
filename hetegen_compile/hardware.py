"""Which hardware profile the options mean."""

from __future__ import annotations

import logging
from functools import cache

from hetegen_compile.accelerators import uses_cuda
from hetegen_compile.calibration import (
    Machine,
    cache_path,
    calibrate,
    read_profile,
    seems_disturbed,
    this_machine,
    write_profile,
)
from hetegen_compile.calibration.runner import EMULATED_PRESET
from hetegen_compile.cost_model import HardwareProfile, load_profile
from hetegen_compile.options import Options

logger = logging.getLogger("hetegen_compile")


def profile_for(options: Options) -> HardwareProfile:
    """The profile that ``hardware`` names: a preset, a file, or for "auto" one that suits the accelerator.

    "auto" measures this machine once where a CUDA device is used. With the emulated accelerator it is the
    preset "cpu-emulated", whatever the machine: its times say nothing about speed anyway, and an unmeasured
    profile makes first calls quick and plans the same everywhere.

    Raises:
        HardwareProfileError: no such preset or file, or not a valid profile.
        AcceleratorUnavailableError: accelerator="cuda" without a device.
    """
    if options.hardware != "auto":
        return load_profile(options.hardware)
    if not uses_cuda(options.accelerator):
        return load_profile(EMULATED_PRESET)
    return _measured(this_machine(cuda=True))


@cache
def _measured(machine: Machine) -> HardwareProfile:
    """The cached profile of this machine, else a new one; once per process even if no file can be written."""
    path = cache_path(machine)
    profile = read_profile(path, machine) if path is not None else None
    if profile is None:
        logger.info("measuring this machine once, which takes two to three minutes: %s", machine)
        profile = calibrate(accelerator="cuda")
        write_profile(path, profile)
    elif disturbed := seems_disturbed(profile):
        logger.warning("%s seems to have been measured beside other work, run hetegen calibrate: %s", path, disturbed)
    return profile
