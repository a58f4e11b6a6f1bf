"""What is done when memory lacks: a new plan for a forward that outgrew its own, less resident on a full device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from hetegen_compile.errors import AcceleratorMemoryError, BudgetError, UnforeseenMemoryError
from hetegen_compile.mirrors import NoRoomError
from hetegen_compile.options import format_bytes
from hetegen_compile.passes.context import Refusal
from hetegen_compile.steps.run_step import UnrepeatableError
from hetegen_compile.steps.step_plans import StepPlans

logger = logging.getLogger("hetegen_compile")

_NEW_PLANS = 2
"""Plans that are made for a forward that outgrew its plan; the second counts in what the first did not foresee."""

_Result = TypeVar("_Result")


def with_remedies(plans: StepPlans, work: Callable[[], _Result]) -> _Result:
    """Do ``work`` again after it met a lack of memory: with a new plan, with less resident.

    The exceptions are let go before: their tracebacks hold the values of the step.

    Raises:
        BudgetError: no plan for this forward fits the budget.
        AcceleratorMemoryError: the accelerator ran out of memory twice, or after a write that must not be repeated.
    """
    outgrown, pressed = 0, ""
    while True:
        try:
            return work()
        except NoRoomError as error:  # nothing has run: a cache has grown beyond the plan
            if outgrown == _NEW_PLANS:
                raise _too_large(plans.budget_bytes, error.excess_bytes) from error
            outgrown += 1
            plans.unforeseen_bytes += error.excess_bytes if outgrown == _NEW_PLANS else 0
        except UnforeseenMemoryError as error:  # nothing has run: verification counts more than the plan
            if outgrown == _NEW_PLANS:
                raise
            outgrown += 1
            plans.unforeseen_bytes += error.excess_bytes
        except AcceleratorMemoryError as error:
            if pressed or isinstance(error, UnrepeatableError):
                raise
            pressed = str(error)
            _relieve(plans, pressed)
        except BudgetError as error:
            if not pressed:
                raise
            raise AcceleratorMemoryError(f"{pressed}; nor does it fit with fewer resident weights: {error}") from error
        plans.outdate()


def _too_large(budget_bytes: int, excess_bytes: int) -> BudgetError:
    return BudgetError(
        f"this forward needs {format_bytes(excess_bytes)} more on the accelerator than gpu_memory="
        f"{format_bytes(budget_bytes)} leaves beside its activations",
        f"set options={{'gpu_memory': {budget_bytes + excess_bytes}}} or more, or use a smaller batch or a shorter "
        "context",
    )


def _relieve(plans: StepPlans, reason: str) -> None:
    """Count on less memory from now on, and say so."""
    limit = plans.runtime.lower_limit(plans.budget_bytes)
    text = f"lowered to {format_bytes(limit)} and the step run again: {reason}"
    logger.warning("gpu_memory %s", text)
    plans.notes += (Refusal("gpu_memory", text),)


__all__ = ["with_remedies"]
