"""The runtime computes host parts with the kernels that the hardware profile records, and says when it cannot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hetegen_compile
from hetegen_compile import linear_parts
from hetegen_compile.cost_model import KernelChoice, load_profile, profile_to_json
from hetegen_compile.host_kernels import KERNELS, LINEAR, VECTORISED, HostKernel, HostLinear, bind_kernels
from hetegen_compile.steps import bind
from tests.models.harness import fresh_dynamo, through_inductor

__all__ = ["fresh_dynamo"]

Calls = list[tuple[str, int]]
ProfileWith = Callable[[tuple[float, str]], str]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """(kernel, tokens) of each call of a kernel of the registry."""
    seen: Calls = []

    def spied(kernel: HostKernel) -> HostKernel:
        def run(x: Tensor, rows: Tensor, bias: Tensor | None, lo: int, hi: int, dim: int) -> Tensor:
            seen.append((kernel.name, x.numel() // x.shape[-1]))
            return kernel.run(x, rows, bias, lo, hi, dim)

        return replace(kernel, run=run, reading=None)  # programs compute with what has a reading by themselves

    for name, kernel in list(KERNELS.items()):
        monkeypatch.setitem(KERNELS, name, spied(kernel))
    return seen


def choice(*points: tuple[float, str]) -> dict[str, KernelChoice]:
    return {"float32": KernelChoice(points)}


def test_the_recorded_kernel_is_called_by_the_number_of_tokens(calls: Calls) -> None:
    rows = torch.randn(6, 8)
    linear = bind_kernels(choice((1.0, "vectorised"), (16.0, "F.linear")), rows, 2, 8, 0)
    for tokens in (1, 4, 5, 64):
        x = torch.randn(tokens, 8)
        torch.testing.assert_close(linear(x, rows, None), nn.functional.linear(x, rows))
    assert calls == [("vectorised", 1), ("vectorised", 4), ("F.linear", 5), ("F.linear", 64)]


def test_a_profile_without_kernels_means_f_linear() -> None:
    linear = bind_kernels({}, torch.ones(6, 8), 0, 6, 0)
    assert linear == HostLinear(0, 6, 0, ((math.inf, LINEAR),))
    assert linear.is_torchs
    assert not bind_kernels(choice((1.0, "F.linear"), (16.0, "vectorised")), torch.ones(6, 8), 0, 6, 0).is_torchs


@pytest.mark.parametrize(
    ("name", "rows", "why"),
    [
        ("of tomorrow", torch.ones(6, 8), "no kernel of that name"),
        ("vectorised", torch.ones(8, 6).t(), "not contiguous"),
        ("int8pack", torch.ones(6, 8), "no form for torch.float32"),
    ],
)
def test_a_kernel_that_cannot_be_used_is_replaced_with_a_reason(name: str, rows: Tensor, why: str) -> None:
    reasons: list[str] = []
    linear = bind_kernels(choice((1.0, name)), rows, 0, 6, 0, reasons.append)
    assert linear.kernel(1) is LINEAR
    (reason,) = reasons
    assert why in reason
    assert f"'{name}'" in reason


def test_autocast_and_mixed_types_are_left_to_torch() -> None:
    rows, x = torch.randn(6, 8), torch.randn(1, 8)
    linear = HostLinear(0, 6, 0, ((math.inf, VECTORISED),))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, rows, None).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x.double(), rows, None)
    assert linear(x[:0], rows, None).shape == (0, 6)


def test_int8_rows_meet_bfloat16_activations(calls: Calls) -> None:
    rows, x = torch.ones(6, 16, dtype=torch.int8), torch.ones(1, 16, dtype=torch.bfloat16)
    linear = bind_kernels({"int8": KernelChoice(((1.0, "int8pack"),))}, rows, 0, 6, 0)
    assert linear(x, rows, None).tolist() == [[16.0] * 6]
    assert calls == [("int8pack", 1)]


class Mlp(nn.Module):
    """Two Linears of which rows go to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, 64] -> the same shape."""
        result: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return result


@pytest.fixture
def profile_with(tmp_path: Path) -> ProfileWith:
    """A function (point) -> path of a profile with this choice of float32 kernels."""

    def write(point: tuple[float, str]) -> str:
        preset = load_profile("cpu-emulated")
        host = replace(preset.host, linear_kernels=choice(point))
        path = tmp_path / "profile.json"
        path.write_text(json.dumps(profile_to_json(replace(preset, name="with-kernels", host=host))))
        return str(path)

    return write


def run_compiled(hardware: str, tokens: int) -> tuple[Tensor, Tensor, str]:
    """(result, eager's result, explain) of a compiled model half of whose rows are computed on the host."""
    torch.manual_seed(0)
    model, x = Mlp().eval(), torch.randn(tokens, 64)
    options: dict[str, Any] = {"hardware": hardware, "accelerator": "emulated", "split": 0.5}
    options |= {"gpu_memory": "1MiB", "print_schedule": False}
    compiled = torch.compile(model, backend="hetegen", options=options)
    with torch.no_grad():
        return compiled(x), model(x), hetegen_compile.schedules()[-1].explain()


@through_inductor
def test_a_compiled_model_computes_its_host_parts_with_the_recorded_kernel(
    calls: Calls, profile_with: ProfileWith
) -> None:
    result, expected, explained = run_compiled(profile_with((1.0, "vectorised")), 1)
    torch.testing.assert_close(result, expected)
    assert calls == [("vectorised", 1)] * 2
    assert "computed with F.linear" not in explained


@through_inductor
def test_a_compiled_model_explains_why_it_falls_back(calls: Calls, profile_with: ProfileWith) -> None:
    result, expected, explained = run_compiled(profile_with((1.0, "of tomorrow")), 2)
    torch.testing.assert_close(result, expected)
    assert calls == []
    assert "host Linears: computed with F.linear, not with the hardware profile's kernel 'of tomorrow'" in explained


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torchs_linear_on_the_host_is_given_usual_strides_in_bfloat16(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With those of one token behind attention it takes up to 60 times as long in bfloat16, and only there."""
    seen: list[tuple[int, ...]] = []
    made = linear_parts.rows_function

    def rows_function(*args: Any, **kwargs: Any) -> Callable[..., Tensor]:
        linear = made(*args, **kwargs)

        def spied(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
            seen.append(x.stride())
            return linear(x, rows, bias)

        return spied

    monkeypatch.setattr(bind, "rows_function", rows_function)
    model = nn.Sequential(nn.Linear(64, 2048, bias=False)).to(dtype).eval()
    odd = torch.randn(64).to(dtype).as_strided((1, 1, 64), (64, 8, 1))
    options: dict[str, Any] = {"accelerator": "emulated", "split": 1.0, "gpu_memory": "100KiB"}
    with torch.no_grad():
        result = torch.compile(lambda x: model(x), backend="hetegen", options=options | {"print_schedule": False})(odd)
        torch.testing.assert_close(result, model(odd))
    assert seen == [(64, 64 if dtype == torch.bfloat16 else 8, 1)]
