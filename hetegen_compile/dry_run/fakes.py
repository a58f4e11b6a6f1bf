"""A model and its inputs as fakes in host memory: the geometry of everything, the bytes of nothing."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from hetegen_compile.errors import UnsupportedModelError

_T = TypeVar("_T")

_PLAIN = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)
_HINTS = ("_dynamo_dynamic_indices", "_dynamo_dynamic_range", "_dynamo_weak_dynamic_indices", "_dynamo_static_indices")
"""What ``torch._dynamo.mark_dynamic`` and its like leave on a tensor."""


class Fakes:
    """Fakes of tensors, in one mode: equal tensors have equal fakes, and tensors that share memory share it still."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._memo: dict[int, Any] = {}
        self._kept: list[Any] = []
        self._storages: dict[int, Tensor] = {}

    def copy(self, value: _T) -> _T:
        """A deep copy of a model, or of a nest of inputs, with fakes for its tensors; ``value`` stays as it was.

        Raises:
            UnsupportedModelError: a tensor is neither in host memory nor on meta, or ``value`` cannot be copied.
        """
        for module in value.modules() if isinstance(value, nn.Module) else ():
            for tensor in _own_tensors(module):
                self._memo[id(tensor)] = self._fake(tensor)
        self._kept.append(value)
        with torch.no_grad(), _FakeCopies(self):
            try:
                return copy.deepcopy(value, self._memo)
            except (TypeError, RuntimeError, NotImplementedError) as error:
                raise UnsupportedModelError(
                    f"a plan is made from a copy of the {type(value).__name__}, which cannot be made: {error}"
                ) from error

    def of(self, tensor: Tensor) -> Tensor:
        """The fake of one tensor."""
        if id(tensor) not in self._memo:
            self._memo[id(tensor)] = self._fake(tensor)
            self._kept.append(tensor)
        found: Tensor = self._memo[id(tensor)]
        return found

    def _fake(self, tensor: Tensor) -> Tensor:
        if tensor.device.type not in ("cpu", "meta"):
            raise UnsupportedModelError(
                f"a tensor of shape {tuple(tensor.shape)} is on {tensor.device}; a plan is made for models in host "
                "memory or on meta: call .to('cpu') or .to('meta') on it first"
            )
        if type(tensor) not in _PLAIN or tensor.layout != torch.strided:
            return self.mode.from_tensor(tensor, static_shapes=True)
        with self.mode, torch.no_grad():
            fake = self._in_its_storage(tensor)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        for hint in _HINTS:
            if hasattr(tensor, hint):
                setattr(fake, hint, copy.copy(getattr(tensor, hint)))
        return fake

    def _in_its_storage(self, tensor: Tensor) -> Tensor:
        """A new fake, or a view of the one that stands for the same storage."""
        storage = tensor.untyped_storage()
        geometry = tuple(tensor.shape), tuple(tensor.stride())
        base = self._storages.get(storage._cdata)
        if base is None:
            whole = tensor.storage_offset() == 0 and tensor.numel() * tensor.element_size() == storage.nbytes()
            if whole:
                base = torch.empty_strided(*geometry, dtype=tensor.dtype, device="cpu")
            else:
                base = torch.empty(storage.nbytes() // tensor.element_size(), dtype=tensor.dtype, device="cpu")
            self._storages[storage._cdata] = base
            if whole:
                return base
        same_type = base if base.dtype == tensor.dtype else base.flatten().view(tensor.dtype)
        return same_type.as_strided(*geometry, tensor.storage_offset())


class _FakeCopies(TorchFunctionMode):
    """``copy.deepcopy`` of a tensor gives its fake."""

    def __init__(self, fakes: Fakes) -> None:
        super().__init__()
        self._fakes = fakes

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            return self._fakes.of(args[0])
        if func is torch._C.TensorBase.clone:  # what a Parameter's own __deepcopy__ calls
            return self._fakes.of(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensor in itertools.chain(module._parameters.values(), module._buffers.values()):
        if tensor is not None:
            yield tensor
