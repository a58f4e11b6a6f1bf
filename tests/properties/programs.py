"""Random models: a program of small steps over a pool of activations, and the module that runs it.

Every value of the pool is an activation [batch, tokens, width]. A step reads values by their place in the pool
and usually adds one. Weights are numbered, so two steps may use one weight (tied), also one as a Linear's and
the other as an embedding's or transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 24
CACHE_LENGTH = 6
WIDTHS = (8, 16, 24, 33, 64)


class Step(NamedTuple):
    """One step: what it does, what it reads of the pool, which weights it uses, and a number to choose with."""

    kind: str
    sources: tuple[int, ...]
    weights: tuple[int, ...] = ()
    number: int = 0


class Result(NamedTuple):
    """One result of the forward: how it is made of which value (or of which input)."""

    kind: str
    source: int


@dataclass(frozen=True)
class Program:
    """A model and what it is called with: the input's width, weights' shapes, steps, results."""

    width: int
    weights: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    results: tuple[Result, ...]


class Inputs(NamedTuple):
    """What a forward is given."""

    x: Tensor
    ids: Tensor
    mask: Tensor
    cache: Tensor
    position: Tensor


class ProgramModel(nn.Module):
    """Runs a program; buffers are one running mean for each width and a counter."""

    counter: Tensor

    def __init__(self, program: Program, seed: int = 0) -> None:
        super().__init__()
        self.program = program
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList(_weight(shape, generator) for shape in program.weights)
        for width in WIDTHS:
            self.register_buffer(f"mean_{width}", torch.zeros(width))
        self.register_buffer("counter", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, ids: Tensor, mask: Tensor, cache: Tensor, position: Tensor) -> tuple[Any, ...]:
        inputs = Inputs(x, ids, mask, cache, position)
        pool = [x]
        for step in self.program.steps:
            made = _STEPS[step.kind](self, pool, step, inputs)
            if made is not None:
                pool.append(made)
        return tuple(_RESULTS[result.kind](pool[result.source], inputs) for result in self.program.results)


def _weight(shape: tuple[int, ...], generator: torch.Generator) -> nn.Parameter:
    scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.5
    return nn.Parameter(torch.randn(shape, generator=generator) * scale)


# ---- steps -------------------------------------------------------------------------------------------------

_Run = Callable[[ProgramModel, list[Tensor], Step, Inputs], Tensor | None]


def _linear(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    bias = model.weights[step.weights[1]] if len(step.weights) > 1 else None
    return F.linear(pool[step.sources[0]], model.weights[step.weights[0]], bias)


def _conv1d(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    """As GPT-2's Conv1D: the weight is stored [in, out]."""
    x, weight, bias = pool[step.sources[0]], model.weights[step.weights[0]], model.weights[step.weights[1]]
    flat: Tensor = torch.addmm(bias, x.reshape(-1, x.size(-1)), weight)
    return flat.view(*x.shape[:-1], weight.shape[1])


def _matmul(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    weight = model.weights[step.weights[0]]
    product: Tensor = pool[step.sources[0]] @ (weight.t() if step.number % 2 else weight)
    return product


def _attention(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    q, k, v = (pool[source] for source in step.sources)
    heads = 2 if q.shape[-1] % 2 == 0 else 1
    q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=step.number % 2 == 0)
    return mixed.transpose(1, 2).reshape(pool[step.sources[0]].shape)


def _norm(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    x, weight = pool[step.sources[0]], model.weights[step.weights[0]]
    if step.number % 2:
        return F.layer_norm(x, weight.shape, weight, eps=0.1)
    return F.rms_norm(x, weight.shape, weight, 0.1)


def _activation(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    functions = (F.gelu, F.relu, F.silu, torch.tanh)
    return functions[step.number % len(functions)](pool[step.sources[0]])


def _add(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    one, other = (pool[source] for source in step.sources)
    return one * torch.tanh(other) if step.number % 2 else one + other


def _narrow(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    """A view of some columns."""
    return pool[step.sources[0]][..., : step.number]


def _view(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    """Another view of the whole."""
    x = pool[step.sources[0]]
    return x.transpose(0, 1).transpose(0, 1) if step.number % 2 else x[:]


def _write(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> None:
    """In place, into an activation or the input."""
    one, other = (pool[source] for source in step.sources)
    if step.number % 3 == 0:
        one.add_(torch.tanh(other))
    elif step.number % 3 == 1:
        one[:, -1] = other[:, 0]
    else:
        one.mul_(0.5)


def _running_mean(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    x = pool[step.sources[0]]
    mean: Tensor = getattr(model, f"mean_{x.shape[-1]}")
    if step.number % 2:
        mean.lerp_(x.mean((0, 1)), 0.25)
    return x + mean


def _counter(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    if step.number % 2:
        model.counter.add_(1)
    return pool[step.sources[0]] + model.counter * 0.125


def _cache(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    """Writes a position of the cache and reads all of it."""
    x = pool[step.sources[0]]
    inputs.cache.index_copy_(1, inputs.position, x[:, :1])
    if step.number % 2:
        inputs.position.add_(1)
    return x + inputs.cache.mean(1, keepdim=True)


def _grown(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    """Along the tokens, as a dynamic cache grows, and back."""
    one, other = (pool[source] for source in step.sources)
    return torch.cat([one, other], dim=1)[:, : one.shape[1]]


def _embedding(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    return F.embedding(inputs.ids, model.weights[step.weights[0]])


def _masked(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    return pool[step.sources[0]].masked_fill(~inputs.mask[..., None], 0.0)


def _sized(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    """Arithmetic with a size that may be a symbol."""
    x = pool[step.sources[0]]
    return x + torch.arange(x.shape[1], dtype=x.dtype)[:, None] / (x.shape[1] + 1)


def _cast(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    x = pool[step.sources[0]]
    return (x.double() * 0.75).to(x.dtype)


def _noise(model: ProgramModel, pool: list[Tensor], step: Step, inputs: Inputs) -> Tensor:
    x = pool[step.sources[0]]
    return x + 0.1 * torch.rand_like(x)


_STEPS: dict[str, _Run] = {
    "linear": _linear, "conv1d": _conv1d, "matmul": _matmul, "attention": _attention, "norm": _norm,
    "activation": _activation, "add": _add, "narrow": _narrow, "view": _view, "write": _write,
    "running_mean": _running_mean, "counter": _counter, "cache": _cache, "grown": _grown, "embedding": _embedding,
    "masked": _masked, "sized": _sized, "cast": _cast, "noise": _noise,
}  # fmt: skip

_RESULTS: dict[str, Callable[[Tensor, Inputs], Any]] = {
    "value": lambda value, inputs: value,
    "sum": lambda value, inputs: value.sum(-1),
    "transposed": lambda value, inputs: value.transpose(1, 2),
    "last": lambda value, inputs: value[:, -1],
    "input": lambda value, inputs: inputs.x,
    "cache view": lambda value, inputs: inputs.cache[:, 1:],
    "ids view": lambda value, inputs: inputs.ids.t(),
    "size": lambda value, inputs: value.shape[1] + 1,
    "nothing": lambda value, inputs: None,
}


# ---- how they are drawn ------------------------------------------------------------------------------------

_SAME_WIDTH = {"attention": 3, "add": 2, "write": 2, "grown": 2}
"""Kinds that read several values of one width."""
_PROJECTIONS = ("linear", "conv1d", "matmul", "siblings")


class _Draft:
    """A program while it is drawn: the widths of the pool's values, and the weights so far."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.width = draw(st.sampled_from(WIDTHS))
        self.widths = [self.width]
        self.weights: list[tuple[int, ...]] = []
        self.steps: list[Step] = []

    def add(self, kind: str) -> None:
        source = self.draw(st.integers(0, len(self.widths) - 1))
        width, number = self.widths[source], self.draw(st.integers(0, 5))
        if kind in _PROJECTIONS:
            self._project(kind, source, number)
        elif kind == "narrow":
            self._narrow(source, width)
        elif kind == "embedding":
            self._append(Step(kind, (), (self._weight((VOCABULARY, width)),), number), width)
        elif kind == "norm":
            self._append(Step(kind, (source,), (self._weight((width,)),), number), width)
        elif kind != "cache" or width == self.width:
            others = [self._like(width) for _ in range(_SAME_WIDTH.get(kind, 1) - 1)]
            self._append(Step(kind, (source, *others), (), number), None if kind == "write" else width)

    def _append(self, step: Step, width: int | None) -> None:
        self.steps.append(step)
        if width is not None:
            self.widths.append(width)

    def _like(self, width: int) -> int:
        same = [place for place, other in enumerate(self.widths) if other == width]
        return self.draw(st.sampled_from(same))

    def _weight(self, shape: tuple[int, ...]) -> int:
        """A new weight, or one of this shape that there is already."""
        same = [place for place, other in enumerate(self.weights) if other == shape]
        again: bool = self.draw(st.booleans()) if same else False
        if again:
            return self.draw(st.sampled_from(same))
        self.weights.append(shape)
        return len(self.weights) - 1

    def _project(self, kind: str, source: int, number: int) -> None:
        width, out = self.widths[source], self.draw(st.sampled_from(WIDTHS))
        if kind == "siblings":
            for _ in range(2 + number % 2):
                self._project("linear", source, self.draw(st.integers(0, 1)))
            return
        is_out_in = kind == "linear" or (kind == "matmul" and number % 2 == 1)
        weights = [self._weight((out, width) if is_out_in else (width, out))]
        if kind == "conv1d" or (kind == "linear" and number % 2):
            weights.append(self._weight((out,)))
        self._append(Step(kind, (source,), tuple(weights), number), out)

    def _narrow(self, source: int, width: int) -> None:
        narrower = [other for other in WIDTHS if other < width]
        if narrower:
            columns = self.draw(st.sampled_from(narrower))
            self._append(Step("narrow", (source,), (), columns), columns)


@st.composite
def programs(draw: st.DrawFn, most_steps: int = 12) -> Program:
    """Programs with at least one Linear and one result that is computed."""
    draft = _Draft(draw)
    kinds = st.sampled_from((*_PROJECTIONS, *_PROJECTIONS, *_STEPS))
    chosen: list[str] = draw(st.lists(kinds, min_size=1, max_size=most_steps))
    for kind in ["linear", *chosen]:
        draft.add(kind)
    places = st.integers(0, len(draft.widths) - 1)
    more = draw(st.lists(st.builds(Result, st.sampled_from(tuple(_RESULTS)), places), max_size=3))
    results = (Result("value", len(draft.widths) - 1), *more)
    return Program(draft.width, tuple(draft.weights), tuple(draft.steps), results)


def make_inputs(program: Program, batch: int, tokens: int, dtype: torch.dtype, seed: int) -> Inputs:
    """Inputs of one forward, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return Inputs(
        torch.randn(batch, tokens, program.width, generator=generator).to(dtype),
        torch.randint(VOCABULARY, (batch, tokens), generator=generator),
        torch.rand(batch, tokens, generator=generator) > 0.25,
        torch.randn(batch, CACHE_LENGTH, program.width, generator=generator).to(dtype),
        torch.tensor([1]),
    )


def linear_bytes(program: Program, dtype: torch.dtype) -> int:
    """Bytes of the two-dimensional weights that some step multiplies with."""
    used = {step.weights[0] for step in program.steps if step.kind in _PROJECTIONS}
    shapes: Sequence[tuple[int, ...]] = [program.weights[place] for place in used]
    return sum(rows * columns for rows, columns in shapes) * dtype.itemsize
