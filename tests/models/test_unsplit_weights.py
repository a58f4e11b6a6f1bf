"""Models whose weights cannot be split and exceed the budget: they run, and compute what eager does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import hetegen_compile
from hetegen_compile.errors import BudgetError
from tests.models.architectures import generate, prompts, tiny_model
from tests.models.harness import RecordingBackend, emulated, new_schedules
from tests.models.layers import Layers

WIDTH = 128


class Columns(nn.Module):
    """Three Linears side by side in one parameter, whose parts are not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH) / 12)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.weight.chunk(3, dim=1)
        return F.linear(x, first) * torch.sigmoid(F.linear(x, second)) + F.linear(x, third)


class Int8(nn.Module):
    """A weight of int8 and a scale for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", torch.randint(-127, 128, (WIDTH, WIDTH), dtype=torch.int8))
        self.scale = nn.Parameter(torch.rand(WIDTH, 1) / 1000)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


class LowRank(nn.Module):
    """A weight and a correction of low rank that is added in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 12)
        self.up, self.down = nn.Parameter(torch.randn(WIDTH, 2) / 12), nn.Parameter(torch.randn(2, WIDTH) / 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.up @ self.down)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


class Positions(nn.Module):
    """Some rows of a large table, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1024, WIDTH))
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.table[: x.shape[1]])  # type: ignore[no-any-return]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "columns": Columns,
    "int8": Int8,
    "low rank": LowRank,
    "weight norm": lambda: weight_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral norm": lambda: spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "convolution": Convolution,
    "positions": Positions,
}


def nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("share", [0.25, 0.7])
def test_what_does_not_fit_is_computed_on_the_host(name: str, share: float) -> None:
    torch.manual_seed(0)
    model, x = Layers(LAYERS[name], 4).eval(), torch.randn(1, 3, WIDTH)
    budget = int(nbytes(model) * share)
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    compiled = torch.compile(model, backend=backend, options=emulated(gpu_memory=budget, split="auto"))
    with torch.no_grad():
        expected = model(x)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    (schedule,) = new_schedules(known)
    assert len(backend.graphs) == 1
    assert "do not fit and cannot be split: computed on the host" in schedule.explain()
    assert 0 < backend.accelerator.counters.peak_bytes <= budget


def test_most_of_what_fits_stays() -> None:
    torch.manual_seed(0)
    model, x = Layers(Convolution, 4).eval(), torch.randn(1, 3, WIDTH)
    kernel = next(p.nbytes for p in model.parameters() if p.dim() == 3)
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    options = emulated(gpu_memory=3 * kernel + (16 << 10), split="auto")
    compiled = torch.compile(model, backend=backend, options=options)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    (schedule,) = new_schedules(known)
    assert schedule.resident_bytes == 3 * kernel
    uploaded = backend.accelerator.counters.uploaded_bytes["weights"]
    assert 3 * kernel <= uploaded < 3 * kernel + 4096, "each once; the biases go up, too"


def test_linears_beside_them_are_split_and_streamed() -> None:
    torch.manual_seed(0)

    def layer() -> nn.Module:
        return nn.Sequential(weight_norm(nn.Linear(WIDTH, 2 * WIDTH)), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))

    model, x = Layers(layer, 4).eval(), torch.randn(1, 3, WIDTH)
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    options = emulated(gpu_memory=nbytes(model) // 4, split=0.5)
    compiled = torch.compile(model, backend=backend, options=options)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    (schedule,) = new_schedules(known)
    linears = [row for row in schedule.rows if row.op == "linear" and row.host_share is not None]
    assert sum(len(row.parts) > 1 for row in linears) == 4
    assert schedule.streamed_bytes
    assert "original1 and 3 more" in schedule.explain()


def test_generation_with_computed_weights() -> None:
    """Prefill and decode agree on what stays, over two calls with other batches."""
    model = tiny_model("llama", layers=1)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            weight_norm(getattr(layer.mlp, name))
    budget = nbytes(model) * 2 // 3
    expected = [generate(model, prompts(batch), None, tokens=4) for batch in (2, 1)]
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    model.compile(backend=backend, options=emulated(gpu_memory=budget, split="auto", context=12))
    for batch, eager in zip((2, 1), expected, strict=True):
        assert torch.equal(generate(model, prompts(batch), None, tokens=4)["sequences"], eager["sequences"])
    assert 0 < backend.accelerator.counters.peak_bytes <= budget
    assert any("computed on the host, where they lie" in schedule.explain() for schedule in new_schedules(known))


def test_a_budget_for_the_activations_alone_is_enough() -> None:
    torch.manual_seed(0)
    model, x = Layers(Columns, 4).eval(), torch.randn(1, 3, WIDTH)
    with torch.no_grad():
        with pytest.raises(BudgetError, match="The smallest budget that works is") as error:
            torch.compile(model, backend=RecordingBackend(), options=emulated(gpu_memory=1024))(x)
        least = int(str(error.value).split("'gpu_memory': ")[1].split("}")[0])
        assert least < nbytes(model) // 16
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=RecordingBackend(), options=emulated(gpu_memory=least))
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
