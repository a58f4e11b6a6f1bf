"""What a measured profile depends on: this machine, and how it was measured."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, dataclass

import torch

from hetegen_compile.cost_model import SCHEMA_VERSION
from hetegen_compile.host_kernels.vectorised import sources_digest
from hetegen_compile.system import cpu_model

METHOD_VERSION = 7
"""Of what a calibration measures and how; a profile that an earlier method measured is measured anew. So is one of
other host kernels, by their sources."""


@dataclass(frozen=True)
class Machine:
    """What a measured profile depends on.

    Attributes:
        cpu: the processor's model.
        gpu: the CUDA device's name; None: none is used.
        torch_version: with its build ("2.13.0+cpu").
        threads: intra-op threads that torch computes with.
    """

    cpu: str
    gpu: str | None
    torch_version: str
    threads: int

    @property
    def key(self) -> str:
        """32 hexadecimal digits that differ whenever a profile must be measured anew."""
        identity = json.dumps([SCHEMA_VERSION, METHOD_VERSION, sources_digest(), *astuple(self)])
        return hashlib.sha256(identity.encode()).hexdigest()[:32]

    @property
    def profile_name(self) -> str:
        """Name of the profile that was measured here."""
        return f"calibrated-{self.key}"

    def __str__(self) -> str:
        return f"{self.cpu}, {self.threads} thread(s), GPU: {self.gpu or 'none'}, torch {self.torch_version}"


def this_machine(*, cuda: bool) -> Machine:
    """The machine that this process runs on, with the current CUDA device if ``cuda``."""
    gpu = torch.cuda.get_device_name(torch.cuda.current_device()) if cuda else None
    return Machine(cpu_model(), gpu, torch.__version__, torch.get_num_threads())
