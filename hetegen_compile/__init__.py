"""hetegen: run PyTorch models that do not fit the GPU, ``torch.compile(model, backend="hetegen")``.

Importing the package is not needed to use the backend once it is installed: torch finds it by its entry point. Imported
from a checkout that is not installed, it makes the entry point known itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hetegen_compile.registration import register_checkout

if TYPE_CHECKING:
    from hetegen_compile.dry_run import plan, plan_generation
    from hetegen_compile.errors import (
        AcceleratorError,
        AcceleratorMemoryError,
        AcceleratorUnavailableError,
        BudgetError,
        CompilationError,
        GradientsNotSupportedError,
        HardwareProfileError,
        HetegenError,
        OptionError,
        ScheduleError,
        UnsupportedModelError,
    )
    from hetegen_compile.overrides import override_split
    from hetegen_compile.reports.schedule import Schedule, schedules
    from hetegen_compile.runtime import refresh

_HOMES = {
    "AcceleratorError": "errors",
    "AcceleratorMemoryError": "errors",
    "AcceleratorUnavailableError": "errors",
    "BudgetError": "errors",
    "CompilationError": "errors",
    "GradientsNotSupportedError": "errors",
    "HardwareProfileError": "errors",
    "HetegenError": "errors",
    "OptionError": "errors",
    "ScheduleError": "errors",
    "UnsupportedModelError": "errors",
    "Schedule": "reports.schedule",
    "override_split": "overrides",
    "plan": "dry_run",
    "plan_generation": "dry_run",
    "refresh": "runtime",
    "schedules": "reports.schedule",
}

__all__ = [
    "AcceleratorError",
    "AcceleratorMemoryError",
    "AcceleratorUnavailableError",
    "BudgetError",
    "CompilationError",
    "GradientsNotSupportedError",
    "HardwareProfileError",
    "HetegenError",
    "OptionError",
    "Schedule",
    "ScheduleError",
    "UnsupportedModelError",
    "override_split",
    "plan",
    "plan_generation",
    "refresh",
    "schedules",
]


def __getattr__(name: str) -> Any:
    """Load the public names when they are first used: ``import hetegen_compile.errors`` stays light."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


register_checkout()
