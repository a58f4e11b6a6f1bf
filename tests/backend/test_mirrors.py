"""What lies on the accelerator is brought up to date when the host's copy changes, and not otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hetegen_compile
from tests.backend.modules import BUDGET, Linear, Mlp, around, random
from tests.models.harness import (
    RecordingBackend,
    assert_like_eager,
    compiled_like_eager,
    emulated,
    new_schedules,
)


def _set_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5


def _copy_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 0.5)


def _copy_in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.copy_(parameter * 0.5)


def _load(model: nn.Module) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def _assign(model: nn.Module) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()}, assign=True)


def _new_parameters(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.detach() * 0.5)


def _write_data_and_refresh(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data *= 0.5
    hetegen_compile.refresh(model)


def _write_numpy_and_refresh(model: nn.Module) -> None:
    for parameter in model.parameters():
        view = parameter.detach().numpy()
        view *= 0.5
    hetegen_compile.refresh(model)


@pytest.mark.parametrize(
    "change",
    [
        _set_data,
        _copy_in_place,
        _copy_in_inference_mode,
        _load,
        _assign,
        _new_parameters,
        _write_data_and_refresh,
        _write_numpy_and_refresh,
    ],
)
def test_changed_parameters_are_noticed(change: Callable[[nn.Module], None], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Mlp().eval()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    x = random(2, 64)

    def run() -> tuple[Tensor, ...]:
        model.load_state_dict(start)
        with torch.no_grad():
            before = [model(x) for _ in range(2)]
            change(model)
            after = [model(x) for _ in range(2)]
        return (*before, *after)

    found = compiled_like_eager(model, run, options=emulated(gpu_memory=BUDGET), compare=_close, weights_change=True)
    assert any(schedule.resident_bytes > 0 for schedule in found.schedules), "some weights are held"
    assert not torch.allclose(found.compiled[1], found.compiled[2])
    assert "does not see" not in caplog.text, "found by chance: by samples of the bytes"


def _one_element(model: nn.Module) -> None:
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight[50, 5] += 100.0
                layer.bias[7] += 1.0


def _one_element_in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        _one_element(model)


def _one_element_unseen_and_refresh(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.detach().numpy().reshape(-1)[17] += 100.0
    hetegen_compile.refresh(model)


@pytest.mark.parametrize("change", [_one_element, _one_element_in_inference_mode, _one_element_unseen_and_refresh])
@pytest.mark.parametrize("budget", [BUDGET, 1 << 20])
def test_a_change_of_one_element_is_noticed_at_once(budget: int, change: Callable[[nn.Module], None]) -> None:
    """By its version or by ``refresh``: samples of the bytes would find it some time."""
    torch.manual_seed(0)
    model, backend, x = Mlp().eval(), RecordingBackend(), random(2, 64)
    model.compile(backend=backend, options=emulated(gpu_memory=budget, split=0.25))
    with torch.no_grad():
        for _ in range(4):
            change(model)
            for _ in range(3):
                torch.testing.assert_close(model(x), model.forward(x))
    assert backend.accelerator.counters.held_bytes["weights"] > 0


@pytest.mark.parametrize("budget", [BUDGET, 1 << 20])
def test_weights_made_in_inference_mode(budget: int) -> None:
    """They have no version: what the accelerator keeps of them goes up in each step, however little has changed."""
    torch.manual_seed(0)
    with torch.inference_mode():
        model, backend, x = Mlp().eval(), RecordingBackend(), random(2, 64)
        model.compile(backend=backend, options=emulated(gpu_memory=budget, split=0.25))
        for _ in range(3):
            _one_element(model)
            for _ in range(2):
                torch.testing.assert_close(model(x), model.forward(x))
    assert backend.accelerator.counters.held_bytes["weights"] > 0


def _close(result: Any, expected: Any) -> None:
    assert_like_eager(list(result), list(expected))


def test_a_resident_weight_is_uploaded_once() -> None:
    torch.manual_seed(0)
    model, x = Mlp().eval(), random(2, 64)
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    model.compile(backend=backend, options=emulated(gpu_memory=BUDGET))
    uploaded = []
    with torch.no_grad():
        for _ in range(3):
            model(x)
            backend.accelerator.synchronize()  # copies for the next step are under way
            ahead = backend.graphs[0].runtime.carried.held_bytes
            uploaded.append(backend.accelerator.counters.uploaded_bytes["weights"] - ahead)
    (schedule,) = new_schedules(known)
    assert schedule.resident_bytes > 0
    first, second, third = uploaded
    assert first == schedule.resident_bytes + schedule.streamed_bytes
    assert third - second == second - first == schedule.streamed_bytes


def _add_to_data(model: nn.Module) -> None:
    """What PEFT's ``merge`` does."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data += torch.ones_like(parameter) * 0.1


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach()


def _write_numpy(model: nn.Module) -> None:
    for parameter in model.parameters():
        view = parameter.detach().numpy()
        view *= 0.5


@pytest.mark.parametrize("change", [_add_to_data, _write_numpy])
def test_writes_that_torch_does_not_see_are_noticed(
    change: Callable[[nn.Module], None], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Mlp().eval()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    x = random(2, 64)

    def run() -> list[Tensor]:
        model.load_state_dict(start)
        with torch.no_grad():
            before = [model(x) for _ in range(2)]
            versions = [parameter._version for parameter in model.parameters()]
            change(model)
            assert versions == [parameter._version for parameter in model.parameters()]
            return [*before, model(x), model(x)]

    found = compiled_like_eager(model, run, options=emulated(gpu_memory=BUDGET), weights_change=True)
    assert any(schedule.resident_bytes > 0 for schedule in found.schedules), "some weights are held"
    assert not torch.allclose(found.compiled[1], found.compiled[2])
    assert "written in a way that torch does not see" in caplog.text


def _growing(before: Linear, after: Linear, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    cache = torch.cat([cache, before(x)])
    return after(cache), cache


def _filled(before: Linear, after: Linear, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    cache[:2].copy_(before(x))
    return after(cache), cache


@pytest.mark.parametrize("body", [_growing, _filled])
def test_a_cache_edited_in_a_way_that_torch_does_not_see(body: Any, caplog: pytest.LogCaptureFixture) -> None:
    """``data`` and numpy between two steps: the first bytes of what a step left are compared at the next."""
    model = around(body)

    def run() -> list[Any]:
        found, cache = [], random(5, 64, seed=2)
        for step in range(4):
            with torch.no_grad():
                result, cache = model(random(2, 64, seed=step), cache)
            found += [result.clone(), cache.clone()]
            cache.data.mul_(0.5)
            cache.numpy()[:] += 1.0
        return found

    compiled_like_eager(model, run, options=emulated(gpu_memory=2 * BUDGET))
    assert "was written in a way that torch does not see" in caplog.text


def test_one_element_written_through_numpy_is_noticed_in_time() -> None:
    torch.manual_seed(0)
    model = Mlp(layers=2, width=128).eval()
    x = random(2, 128)
    backend, options = RecordingBackend(), emulated(gpu_memory=200 << 10, split=0.25)
    model.compile(backend=backend, options=options)
    with torch.no_grad():
        before = model(x)
        assert backend.accelerator.counters.held_bytes["weights"] >= 1.5 * 128 * 128 * 4, "resident"
        for layer in model.layers:
            _weight(layer).numpy()[77, 5] += 100.0
        results = [model(x) for _ in range(200)]
        expected = Mlp.forward(model, x)
    torch.testing.assert_close(results[-1], expected)
    assert not torch.allclose(before, expected)


def test_everything_is_compared_when_a_graph_is_compiled() -> None:
    torch.manual_seed(0)
    model = Mlp().eval()
    x = random(2, 64)
    backend = RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=112 << 10, split=0.25), dynamic=False)
    with torch.no_grad():
        model(x)
        assert backend.accelerator.counters.held_bytes["weights"] >= 3 * 64 * 64 * 4
        for layer in model.layers:
            _weight(layer).numpy()[40, 9] += 100.0
        wider = random(3, 64)
        result, expected = model(wider), Mlp.forward(model, wider)
    assert len(backend.graphs) == 2
    torch.testing.assert_close(result, expected)


def test_what_a_version_shows_is_not_called_unseen_when_a_graph_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, backend = Mlp().eval(), RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=112 << 10, split=0.25), dynamic=False)
    with torch.no_grad():
        for tokens in (2, 3):
            torch.testing.assert_close(model(random(tokens, 64)), model.forward(random(tokens, 64)))
            _copy_in_place(model)
    assert len(backend.graphs) == 2
    assert "does not see" not in caplog.text


def test_what_a_version_shows_of_another_model_is_not_called_unseen(caplog: pytest.LogCaptureFixture) -> None:
    """Compiling one model looks at what is held of all: nobody has asked for the other one's weights since."""
    model, other, x = Mlp().eval(), Mlp(layers=3).eval(), random(2, 64)
    backend = RecordingBackend()
    for one in (model, other):
        one.compile(backend=backend, options=emulated(gpu_memory=112 << 10, split=0.25, seed=None))
    with torch.no_grad():
        model(x)
        assert backend.accelerator.counters.held_bytes["weights"] > 0
        _copy_in_place(model)
        other(x)
        torch.testing.assert_close(model(x), model.forward(x))
    assert "does not see" not in caplog.text


def test_what_a_version_shows_of_a_cache_is_not_called_unseen(caplog: pytest.LogCaptureFixture) -> None:
    """It is edited in place, and the next call needs another graph."""
    model, backend = around(_growing), RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=2 * BUDGET, seed=None), dynamic=False)
    cache = random(5, 64, seed=2)
    with torch.no_grad():
        for tokens in (2, 3):
            expected = model.forward(random(tokens, 64), cache)
            result, cache = model(random(tokens, 64), cache)
            torch.testing.assert_close((result, cache), expected)
            cache[:1].zero_()
    assert len(backend.graphs) == 2
    assert "does not see" not in caplog.text


@pytest.mark.parametrize("budget", [40 << 10, 200 << 10])
def test_parameters_that_are_parts_of_one_tensor(budget: int) -> None:
    """Each has a version counter of its own. They are streamed, stay and change one by one, as others do."""
    torch.manual_seed(0)
    model, x = Mlp(6).eval(), random(2, 64)
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat, model.parameters())
    backend, known = RecordingBackend(), hetegen_compile.schedules()
    model.compile(backend=backend, options=emulated(gpu_memory=budget, split="auto"))
    moved = []
    with torch.no_grad():
        for _ in range(2):
            for _ in range(3):
                torch.testing.assert_close(model(x), Mlp.forward(model, x))
                backend.accelerator.synchronize()  # copies for the next step are under way
                moved.append(sum(backend.accelerator.counters.uploaded_bytes.values()))
            for parameter in list(model.parameters())[::3]:  # weights and biases
                parameter.mul_(0.5)
    (schedule,) = new_schedules(known)
    weights = flat.numel() * 4
    assert schedule.resident_bytes > 0
    assert (schedule.streamed_bytes > 0) == (budget < weights)
    assert moved[2] - moved[1] == moved[5] - moved[4] == schedule.streamed_bytes, "nothing but what is streamed"
    assert moved[3] - moved[2] > schedule.streamed_bytes, "what is held went up again when a part was changed"
    assert backend.accelerator.counters.peak_bytes <= budget


def test_steps_upload_nothing_but_what_is_new() -> None:
    """Parameters (biases), buffers and inputs that stay what they are move once."""
    torch.manual_seed(0)
    model, x = Mlp().eval(), random(2, 64)
    backend = RecordingBackend()
    model.compile(backend=backend, options=emulated(gpu_memory=BUDGET))
    moved = []
    with torch.no_grad():
        for _ in range(4):
            model(x)
            moved.append(backend.accelerator.counters.uploaded_bytes["mirrors"])
        model(random(2, 64, seed=2))
        moved.append(backend.accelerator.counters.uploaded_bytes["mirrors"])
    assert moved[0] == moved[3] >= x.numel() * 4
    assert moved[4] - moved[3] == x.numel() * 4


def test_a_longer_forward_makes_resident_weights_leave() -> None:
    """Its activations need their room, also where it uploads nothing itself."""
    torch.manual_seed(0)
    model = Mlp().eval()
    backend, known, budget = RecordingBackend(), hetegen_compile.schedules(), 80 << 10
    model.compile(backend=backend, options=emulated(gpu_memory=budget, split=0.25), dynamic=True)
    with torch.no_grad():
        for x in (random(2, 64), random(24, 64)):
            torch.testing.assert_close(model(x), Mlp.forward(model, x))
    first, *_, last = new_schedules(known)
    assert first.resident_bytes > last.resident_bytes
    assert backend.accelerator.counters.peak_bytes <= budget
