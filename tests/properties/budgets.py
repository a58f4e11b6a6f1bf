"""Errors on too small a budget name one that works: with that, and if need be with the next, it has to."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from hetegen_compile.errors import BudgetError

_ATTEMPTS = 8
"""A larger forward may need more than the error of a smaller one has named."""

_Result = TypeVar("_Result")


def named_budget(error: BudgetError) -> int:
    """The bytes that the error tells the user to set."""
    found = re.search(r"'gpu_memory': (\d+)", str(error))
    assert found is not None, f"the error names no budget: {error}"
    return int(found[1])


def with_named_budgets(budget: int, run: Callable[[int], _Result]) -> _Result:
    """What ``run`` gives at this budget, or at a larger one that an error has named."""
    for _ in range(_ATTEMPTS):
        try:
            return run(budget)
        except BudgetError as error:
            larger = named_budget(error)
            assert larger > budget, f"{budget} bytes are refused and {larger} are said to be enough"
            budget = larger
    raise AssertionError(f"no budget is enough: {budget}")
