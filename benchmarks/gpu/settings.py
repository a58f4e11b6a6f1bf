"""What a run of the stages shares, and the checks that a stage makes."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.children import Notebook

NEEDS_CUDA = "needs a CUDA device"


@dataclass(frozen=True)
class Settings:
    """Of one run.

    Attributes:
        accelerator: "cuda" or "emulated".
        folder: where files go.
        hardware: profile for hetegen: a preset's name, a file, or "auto".
        minutes: of the whole run.
        dtype: of the models that are compared.
        seconds: of the stage that is given these settings.
    """

    accelerator: str
    folder: str
    hardware: str
    minutes: float
    dtype: str
    seconds: float = 600.0

    @property
    def cuda(self) -> bool:
        """Whether a device takes part."""
        return self.accelerator == "cuda"

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)

    @property
    def profile_path(self) -> Path:
        """Where the calibration of this run is kept."""
        return self.path / "profile.json"

    @property
    def measured_hardware(self) -> str:
        """The profile of this run if it was calibrated, else the one that was asked for."""
        return str(self.profile_path) if self.cuda and self.profile_path.exists() else self.hardware


class ChecksFailedError(Exception):
    """At least one check of a stage failed; the notes say which."""


class SkipError(Exception):
    """A check or a stage cannot be made here; the message says why."""


@dataclass
class Checks:
    """Checks that go on after one has failed."""

    notebook: Notebook
    found: list[dict[str, Any]] = field(default_factory=list)

    def check(self, name: str, work: Callable[[], Any]) -> None:
        """Note what ``work`` returns, or what it raises."""
        started = time.perf_counter()
        entry: dict[str, Any] = {"check": name, "result": "ok"}
        try:
            entry["detail"] = work()
        except SkipError as reason:
            entry |= {"result": "skipped", "detail": str(reason)}
        except Exception as error:  # whatever it is: it is written down, and finish() raises
            traceback.print_exc()
            entry |= {"result": "FAILED", "detail": f"{type(error).__name__}: {error}"[:1500]}
        entry["seconds"] = round(time.perf_counter() - started, 2)
        self.found.append(entry)
        self.notebook.note("checks", self.found)

    def finish(self) -> None:
        """Raises ChecksFailedError if a check failed."""
        failed = [entry["check"] for entry in self.found if entry["result"] == "FAILED"]
        if failed:
            raise ChecksFailedError(f"{len(failed)} of {len(self.found)} checks failed: {', '.join(failed)}")


def require(condition: bool, message: str) -> None:
    """Raises AssertionError with the message; not removed by ``python -O``."""
    if not condition:
        raise AssertionError(message)


def device_of(settings: Settings) -> torch.device:
    """The CUDA device; SkipError without one."""
    if not settings.cuda:
        raise SkipError(NEEDS_CUDA)
    return torch.device("cuda", torch.cuda.current_device())
