"""What tests of budgets share: a forward, the smallest budget that an error names, several budgets for one trace."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from hetegen_compile.errors import BudgetError
from tests.models.harness import RecordingBackend, emulated


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


class Kept:
    """Compiles a model in place, and again with other options, though Dynamo traces it once.

    Most of a compilation is Dynamo's tracing, and that is the same for every budget. So what it hands over is kept,
    and handed as a copy to the new backend of each ``compile`` when it is called the first time after that.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[fx.GraphModule] = []
        self._compiled: dict[int, Callable[..., Any]] = {}
        self._backend = RecordingBackend()
        self._options: dict[str, Any] = {}
        model.compile(backend=self._captured)

    def compile(self, backend: RecordingBackend | None = None, **options: Any) -> RecordingBackend:
        """Compile with these options from the next call on; nothing is left of what was compiled before."""
        self._backend.reset()
        self._compiled.clear()
        self._backend, self._options = backend or RecordingBackend(), emulated(**options)
        return self._backend

    def _captured(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        number = len(self._modules)
        self._modules.append(_copied(module))
        self._compiled[number] = self._backend(module, inputs, options=self._options)

        def call(*given: Any) -> Any:
            if number not in self._compiled:
                module = _copied(self._modules[number])
                self._compiled[number] = self._backend(module, given, options=self._options)
            return self._compiled[number](*given)

        return call


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """With nodes and notes of its own and the same weights."""
    return fx.GraphModule(module, copy.deepcopy(module.graph))


def needed_bytes(kept: Kept, run: Callable[[], Any], **options: Any) -> int:
    """The budget that the error for one of a byte names."""
    kept.compile(gpu_memory=1, **options)
    with pytest.raises(BudgetError, match=r"mirrors of inputs.*activations.*staging ring") as error:
        run()
    match = re.search(r"'gpu_memory': (\d+)", str(error.value))
    assert match is not None
    return int(match[1])
