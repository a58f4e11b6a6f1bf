"""What tests of budgets share: a forward, and the smallest budget that an error names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetegen_compile.errors import BudgetError
from tests.models.harness import RecordingBackend, emulated


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def needed_bytes(model: nn.Module, run: Callable[[], Any], **options: Any) -> int:
    """The budget that the error for one of a byte names."""
    torch._dynamo.reset()
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=1, **options))
    with pytest.raises(BudgetError, match=r"mirrors of inputs.*activations.*staging ring") as error:
        run()
    match = re.search(r"'gpu_memory': (\d+)", str(error.value))
    assert match is not None
    return int(match[1])
