"""Unusual inputs and models: the results of eager, or an error that names the tensor and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetegen_compile.errors import UnsupportedModelError
from tests.backend.modules import BUDGET, Linear, Mlp, around, plain, random
from tests.models.harness import Comparison, RecordingBackend, compiled_like_eager, emulated


def _like_eager(model: nn.Module, *inputs: Any, **changes: Any) -> Comparison:
    """One forward; the budget forces offloading, which ``compiled_like_eager`` checks."""

    def run() -> Any:
        with torch.no_grad():
            return model(*inputs)

    return compiled_like_eager(model, run, options=emulated(gpu_memory=BUDGET), **changes)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(random(64, 3).t(), id="transposed"),
        pytest.param(random(3, 128)[:, ::2], id="every other column"),
        pytest.param(random(6, 64)[::2], id="every other row"),
        pytest.param(random(1, 64).expand(3, 64), id="expanded"),
        pytest.param(random(3, 65)[:, 1:], id="not at the start of its memory"),
        pytest.param(random(3, 64).double()[:, :].float(), id="converted"),
    ],
)
def test_inputs_that_are_not_contiguous(x: Tensor) -> None:
    _like_eager(around(plain), x)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)], ids=["no batch", "no tokens"])
def test_inputs_without_elements(shape: tuple[int, ...]) -> None:
    found = _like_eager(around(plain), torch.empty(shape))
    assert found.compiled.shape == shape


def test_none_and_then_some_elements() -> None:
    model = around(plain)

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [model(random(tokens, 64)) for tokens in (3, 0, 5, 0, 1)]

    compiled_like_eager(model, run, options=emulated(gpu_memory=BUDGET))


def test_inputs_of_other_types() -> None:
    def body(before: Linear, after: Linear, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        scale, number, flags, chosen, half = others
        y = after(before(x) * scale + number) * flags
        return y[chosen], y + half, number + 1, flags.logical_not(), scale * 2

    others = (torch.tensor(0.5), torch.tensor(3), random(3, 64) > 0, torch.tensor([2, 0]), random(3, 1).half())
    _like_eager(around(body), random(3, 64), *others)


def test_python_numbers_among_the_inputs() -> None:
    def body(before: Linear, after: Linear, x: Tensor, scale: float, number: int, flag: bool) -> Tensor:
        y = before(x) * scale + number
        return after(-y if flag else y)

    _like_eager(around(body), random(3, 64), 0.5, 3, True)


def test_an_input_of_integers_only() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mlp = nn.Embedding(100, 64), Mlp(4)

        def forward(self, ids: Tensor) -> Tensor:
            result: Tensor = self.mlp(self.table(ids))
            return result

    torch.manual_seed(0)
    _like_eager(Lookup().eval(), torch.tensor([[3, 99, 0]], dtype=torch.int32))


def test_weights_of_float64() -> None:
    model = Mlp(4).double().eval()

    def run() -> Tensor:
        with torch.no_grad():
            result: Tensor = model(random(3, 64).double())
        return result

    compiled_like_eager(model, run, options=emulated(gpu_memory=2 * BUDGET))


class _Phases(nn.Module):
    """A complex Linear between two real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)
        self.turn = nn.Parameter(torch.polar(torch.ones(8, 8), random(8, 8)) / 8)

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.view_as_complex(self.up(x).reshape(*x.shape[:-1], 4, 8, 2)) @ self.turn
        result: Tensor = self.down(torch.view_as_real(turned).flatten(-3))
        return result


def test_a_complex_weight_stays_whole_and_is_explained() -> None:
    torch.manual_seed(0)
    found = _like_eager(_Phases().eval(), random(3, 64))
    assert "turn is torch.complex64" in found.schedules[-1].explain()


# ---- modules with hooks --------------------------------------------------------------------------------------


def test_forward_hooks() -> None:
    seen: list[tuple[int, ...]] = []
    model = Mlp(4).eval()
    model.layers[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.layers[1].register_forward_hook(lambda module, args, result: result + args[0])
    model.layers[2].register_forward_hook(lambda module, args, result: seen.append(tuple(result.shape)))
    _like_eager(model, random(3, 64))
    assert seen == [(3, 64)] * 2, "once in eager and once compiled"


@pytest.mark.parametrize(
    ("name", "room"), [("weight_norm", 66 << 10), ("spectral_norm", 66 << 10), ("orthogonal", 4 * BUDGET)]
)
def test_a_weight_that_is_computed_stays_whole_and_is_explained(name: str, room: int) -> None:
    torch.manual_seed(0)
    model = Mlp(4).eval()
    getattr(torch.nn.utils.parametrizations, name)(model.layers[1])

    def run() -> Tensor:
        with torch.no_grad():
            result: Tensor = model(random(3, 64))
        return result

    found = compiled_like_eager(model, run, options=emulated(gpu_memory=room))
    assert "layers.1" in found.schedules[-1].explain()
    linears = [row for row in found.schedules[-1].rows if row.op == "linear"]
    assert len(linears) == 3


# ---- models that are not in host memory ----------------------------------------------------------------------


def test_weights_on_meta_name_the_dry_run() -> None:
    with torch.device("meta"):
        model = Mlp(4).eval()
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=BUDGET))
    with pytest.raises(UnsupportedModelError, match=r"on meta.*hetegen_compile\.plan\("), torch.no_grad():
        model(torch.empty(3, 64, device="meta"))


def test_one_tensor_elsewhere_is_named() -> None:
    class Mixed(Mlp):
        elsewhere: Tensor

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.empty_like(self.elsewhere, device="cpu").zero_()

    model = Mixed(4).eval()
    model.register_buffer("elsewhere", torch.empty(64, device="meta"))
    model.compile(backend=RecordingBackend(), options=emulated(gpu_memory=BUDGET))
    with pytest.raises(UnsupportedModelError, match="elsewhere is on meta"), torch.no_grad():
        model(random(3, 64))
