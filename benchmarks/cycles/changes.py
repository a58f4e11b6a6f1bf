"""What happens to a model between two uses: its weights, its dtype, copies of it, its budget, others beside it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import hetegen_compile
from benchmarks.cycles.generation import forward, generate
from benchmarks.cycles.state import Cycle, Pair


def _scale_in_place(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in matrices(model):
            parameter.mul_(factor)


def _copy_in_inference_mode(model: nn.Module, factor: float) -> None:
    with torch.inference_mode():
        for parameter in matrices(model):
            parameter.copy_(parameter * factor)


def _other_data(model: nn.Module, factor: float) -> None:
    for parameter in matrices(model):
        parameter.data = parameter.data * factor


def _new_parameters(model: nn.Module, factor: float) -> None:
    made: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.dim() > 1:
                other = made.setdefault(id(parameter), nn.Parameter(parameter.detach() * factor))
                setattr(module, name, other)


def _load(model: nn.Module, factor: float) -> None:
    model.load_state_dict({name: _scaled(tensor, factor) for name, tensor in model.state_dict().items()})


def _load_and_assign(model: nn.Module, factor: float) -> None:
    scaled: dict[tuple[Any, ...], Tensor] = {}  # what is tied stays tied
    states = {
        name: scaled.setdefault((tensor.data_ptr(), tensor.shape), _scaled(tensor, factor))
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(states, assign=True)


def _unseen(model: nn.Module, factor: float) -> None:
    for parameter in matrices(model):
        parameter.data *= factor


def _unseen_and_refreshed(model: nn.Module, factor: float) -> None:
    for parameter in matrices(model):
        if parameter.dtype != torch.bfloat16:
            parameter.detach().numpy()[...] *= factor
    hetegen_compile.refresh(model)


WRITES: dict[str, Callable[[nn.Module, float], None]] = {
    "in place": _scale_in_place, "in inference mode": _copy_in_inference_mode, "p.data = other": _other_data,
    "new parameters": _new_parameters, "load_state_dict": _load, "load_state_dict, assigned": _load_and_assign,
    "p.data *= factor": _unseen, "numpy and refresh": _unseen_and_refreshed,
}  # fmt: skip
UNSEEN = ("p.data *= factor", "numpy and refresh")


def matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that are no vectors."""
    return (parameter for parameter in model.parameters() if parameter.dim() > 1)


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor * factor if tensor.is_floating_point() and tensor.dim() > 1 else tensor.clone()


def _use(cycle: Cycle, pair: Pair, rng: Random) -> None:
    forward(cycle, pair, rng) if pair.kind == "masked" or rng.random() < 0.4 else generate(cycle, pair, rng)


def write(cycle: Cycle, pair: Pair, rng: Random) -> None:
    """Write all matrices, then use the model."""
    how, factor = rng.choice(sorted(WRITES)), rng.choice([0.8, 0.9, 1.1])
    cycle.say(f"  {how} x{factor}")
    cycle.watch.unseen_writes |= how in UNSEEN
    for model in pair.both:
        WRITES[how](model, factor)
    _use(cycle, pair, rng)


def tie(cycle: Cycle, pair: Pair, rng: Random) -> None:
    """The output layer gets a weight of its own, or that of the embeddings; without such layers nothing happens."""
    for model in pair.both:
        head, table = _head(model), model.get_input_embeddings()
        if head is None or table is None or head.weight.shape != getattr(table, "weight", head.weight).shape:
            return
        tied = head.weight is table.weight
        head.weight = nn.Parameter(head.weight.detach() * 0.9) if tied else table.weight
        cycle.say(f"  {'untied' if tied else 'tied'}")
    _use(cycle, pair, rng)


def _head(model: Any) -> nn.Linear | None:
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Linear) else None


def to_dtype(cycle: Cycle, pair: Pair, rng: Random) -> None:
    """Another dtype, mostly a wider one: narrow results say less."""
    dtype = rng.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])
    cycle.say(f"  {dtype}")
    for model in pair.both:
        model.to(dtype)
    _use(cycle, pair, rng)


def copied(cycle: Cycle, pair: Pair, rng: Random) -> None:
    """A deep copy with other weights is used; then one of the two goes, mostly the copy."""
    other = Pair(pair.name, pair.kind, copy.deepcopy(pair.model), copy.deepcopy(pair.eager), pair.budget_bytes)
    cycle.pairs.append(other)
    for model in other.both:
        _scale_in_place(model, 0.9)
    _use(cycle, other, rng)
    _use(cycle, pair, rng)
    stays = other if rng.random() < 0.3 else pair
    cycle.say(f"  {'the copy' if stays is other else 'the original'} stays")
    cycle.pairs[:] = [each for each in cycle.pairs if each is stays or (each is not pair and each is not other)]


def compiled_again(cycle: Cycle, pair: Pair, rng: Random) -> None:
    """Under another budget."""
    cycle.compile(pair, rng)
    _use(cycle, pair, rng)


def dynamo_reset(cycle: Cycle, pair: Pair, rng: Random) -> None:
    """All compiled graphs are forgotten while the models live on."""
    torch._dynamo.reset()
    _use(cycle, pair, rng)


def another_beside(cycle: Cycle, pair: Pair, rng: Random) -> None:
    """Another model is compiled beside it and both are used; if there is one, it is deleted and the first goes on."""
    if len(cycle.pairs) == 1:
        others = [("llama", "causal"), ("gpt2", "causal"), ("mistral", "causal"), (pair.name, pair.kind)]
        name, kind = rng.choice(others)
        _use(cycle, cycle.add(name, kind, rng), rng)
    else:
        cycle.say(f"  {cycle.pairs.pop().name} is deleted")
        gc.collect()
    _use(cycle, cycle.pairs[0], rng)
