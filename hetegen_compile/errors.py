"""Every error that a user of hetegen can meet, one class per thing that went wrong.

A leaf: imports nothing of the project, may be imported by every layer.
"""

import traceback


class HetegenError(Exception):
    """Base of all errors of this package."""


class OptionError(HetegenError, ValueError):
    """An option is unknown, of the wrong type or out of range; the message says which and what is valid."""


class HardwareProfileError(HetegenError, ValueError):
    """A hardware profile cannot be found or its file is not a valid profile; the message names the field."""


class AcceleratorUnavailableError(HetegenError, RuntimeError):
    """The accelerator that was asked for does not exist on this machine."""


class BudgetError(HetegenError, MemoryError):
    """``gpu_memory`` cannot hold what must be on the accelerator; the message lists what is needed, and a remedy."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}: {remedy}" if remedy else message)
        self.without_remedy = message


class UnforeseenMemoryError(BudgetError):
    """Verification counts ``excess_bytes`` more in a schedule than its plan left room for."""

    def __init__(self, message: str, excess_bytes: int = 0) -> None:
        super().__init__(message)
        self.excess_bytes = excess_bytes


class GradientsNotSupportedError(HetegenError, RuntimeError):
    """The compiled model was called with gradients enabled; hetegen runs inference only."""


class UnsupportedModelError(HetegenError, RuntimeError):
    """The model cannot be run by this backend (weights on meta, mixed devices, ...)."""


class ScheduleError(HetegenError, RuntimeError):
    """A schedule is wrong: a missing wait, a reused slot, a value on the wrong device (a defect of hetegen)."""


class MissingWaitError(ScheduleError):
    """A value was used before the wait that orders it; names the producing and the using node."""


class SlotInUseError(ScheduleError):
    """A slot was overwritten before the last reader's release; names both nodes."""


class AcceleratorError(HetegenError, RuntimeError):
    """Work on one of the accelerator's streams raised; names the node and keeps the cause."""


class AcceleratorMemoryError(AcceleratorError, MemoryError):
    """The accelerator's memory ran out during a step: somebody else took it, or a plan needs more than it says."""


class CompilationError(HetegenError, RuntimeError):
    """A graph could not be compiled for a reason that is a defect of hetegen or of torch; keeps the cause."""


class HostKernelUnavailableError(HetegenError, RuntimeError):
    """A kernel for Linears on the host cannot be used on this machine; the message says why."""


def first_line(error: BaseException) -> str:
    """What an error says, up to its first line break; its type's name if it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def drop_frames(error: BaseException) -> None:
    """Forget the frames of an error and of all that it came from: they hold the graph, its weights and the accelerator.

    Whoever keeps the error (Inductor keeps what its C++ compiler raised while the process lives) would keep them.
    """
    for one in chain_of(error):
        one.__traceback__ = None


def clear_frames(error: BaseException) -> None:
    """Drop what the frames of an error, and of all that it came from, hold; they stay to be read."""
    for one in chain_of(error):
        traceback.clear_frames(one.__traceback__)


def chain_of(error: BaseException) -> list[BaseException]:
    """An error and all that it came from, each once, itself first."""
    chain = [error]
    for one in chain:
        inner = (one.__cause__, one.__context__, getattr(one, "inner_exception", None))
        chain += [other for other in inner if isinstance(other, BaseException) and other not in chain]
    return chain
