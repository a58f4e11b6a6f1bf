"""``hetegen_compile.plan``: schedules without weights, without running and without traces left behind."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch._dynamo import pgo

import hetegen_compile
from hetegen_compile.dry_run import planning
from hetegen_compile.dry_run.trace import TracedForward, trace
from hetegen_compile.errors import BudgetError, HardwareProfileError, OptionError, UnsupportedModelError
from hetegen_compile.reports.schedule import Schedule
from tests.dry_run.configs import make

OPTIONS: dict[str, object] = {"hardware": "a10-xeon", "gpu_memory": "200KiB"}


def options_for(name: str) -> dict[str, object]:
    """A budget that holds some of the model's weights."""
    budgets = {"opt": "480KiB", "llama": "512KiB", "gpt2": "512KiB", "bert": "400KiB", "mixtral": "320KiB"}
    return {"hardware": "a10-xeon", "gpu_memory": budgets[name]}


def ids(tokens: int = 16, device: str = "meta") -> Tensor:
    return torch.zeros(1, tokens, dtype=torch.long, device=device)


class Blocks(nn.Module):
    """Two Linears with a graph break between them."""

    def __init__(self, device: str = "meta", broken: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(256, 512, device=device)
        self.second = nn.Linear(512, 128, device=device)
        self.broken = broken

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.first(x))
        if self.broken:
            torch._dynamo.graph_break()
        return self.second(y)

    def second_only(self) -> nn.Module:
        """Its second Linear in a module of our own."""

        class Second(nn.Module):
            def __init__(self, linear: nn.Linear) -> None:
                super().__init__()
                self.linear = linear

            def forward(self, x: Tensor) -> Any:
                return torch.relu(self.linear(x))

        return Second(self.second)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral"])
def test_a_plan_of_a_model_on_meta_is_that_of_the_real_one(name: str) -> None:
    on_meta = hetegen_compile.plan(make(name, "meta"), input_ids=ids(), options=options_for(name))
    real = hetegen_compile.plan(make(name, "cpu"), input_ids=ids(device="cpu"), options=options_for(name))
    assert on_meta == real
    assert on_meta.streamed_bytes + on_meta.host_bytes > 0
    assert on_meta.resident_bytes > 0
    assert on_meta.predicted_step_s > on_meta.floor_s > 0
    assert on_meta.measured_step_s is None
    assert all(row.measured_s is None for row in on_meta.rows)
    weights = {row.module for row in on_meta.rows if row.op == "linear"}
    assert len(weights) >= 8


@pytest.mark.parametrize(("hardware", "more"), [("rtx4090-desktop", True), ("cpu-emulated", False)])
def test_a_gpu_is_planned_with_its_room_for_the_largest_value_once_more(
    hardware: str, more: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = cache(lambda: trace(*arguments))  # the same for each plan
    arguments: list[Any] = []

    def once(*given: Any) -> TracedForward:
        arguments[:] = arguments or given
        return traced()

    monkeypatch.setattr(planning, "trace", once)

    def activations(**options: object) -> int:
        given = {**options_for("llama"), "gpu_memory": "4MiB", "split": 0.5, "hardware": hardware, **options}
        return hetegen_compile.plan(make("llama", "meta"), input_ids=ids(), options=given).budget["activations"]

    emulated, cuda = activations(accelerator="emulated"), activations(accelerator="cuda")
    assert emulated < cuda
    assert activations() == (cuda if more else emulated)


def test_nothing_is_computed_and_nothing_is_changed() -> None:
    model = make("llama", "cpu")
    before = {name: (id(t), t._version, t.sum().item()) for name, t in model.state_dict(keep_vars=True).items()}
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        schedule = hetegen_compile.plan(model, input_ids=ids(device="cpu"), options=options_for("llama"))
    assert schedule.streamed_bytes > 0
    taken = [(event.name, event.self_cpu_memory_usage) for event in profile.events() if event.self_cpu_memory_usage > 0]
    assert sum(nbytes for _, nbytes in taken) < 8192, taken
    after = {name: (id(t), t._version, t.sum().item()) for name, t in model.state_dict(keep_vars=True).items()}
    assert before == after


def test_dynamo_is_as_it_was() -> None:
    model = Blocks("cpu")
    code = Blocks.forward.__code__
    x = torch.randn(3, 256)
    with torch.no_grad():
        mine = torch.compile(model, backend="eager")
        expected = mine(x)
        entries = len(eval_frame._debug_get_cache_entry_list(code))
        sizes_seen = dict(pgo._CODE_STATE or {})
        limit = torch._dynamo.config.recompile_limit
        for rows in range(4, 8):
            hetegen_compile.plan(model, torch.empty(rows, 256, device="meta"), options={"hardware": "a10-xeon"})
        assert torch._dynamo.config.recompile_limit == limit
        assert dict(pgo._CODE_STATE or {}) == sizes_seen
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(mine(x), expected)
    assert entries > 0


def test_no_compiled_code_stays_on_a_model_that_was_only_planned() -> None:
    class Fresh(Blocks):
        def forward(self, x: Tensor) -> Any:
            y = torch.relu(self.first(x))
            torch._dynamo.graph_break()
            return self.second(y)

    hetegen_compile.plan(Fresh(), torch.empty(3, 256, device="meta"), options={"hardware": "a10-xeon"})
    assert eval_frame._debug_get_cache_entry_list(Fresh.forward.__code__) == []


def test_a_forward_of_several_graphs_returns_the_heaviest_and_keeps_the_others() -> None:
    schedule = hetegen_compile.plan(Blocks(), torch.empty(3, 256, device="meta"), options=OPTIONS)
    (other,) = schedule.others
    assert {row.module for row in schedule.rows if row.op == "linear"} == {"first"}
    assert {row.module for row in other.rows if row.op == "linear"} == {"second"}
    assert hetegen_compile.schedules()[-2:] == (schedule, other)


def test_weights_of_earlier_graphs_of_the_forward_count_against_the_budget() -> None:
    options = {"hardware": "a10-xeon", "gpu_memory": "700KiB"}  # room for either Linear, not for both
    schedule = hetegen_compile.plan(Blocks(), torch.empty(3, 256, device="meta"), options=options)
    (other,) = schedule.others
    assert schedule.resident_bytes == 512 * 256 * 4
    assert 0 < other.resident_bytes < 512 * 256 * 4, "the part of its weight that is its share"
    alone = hetegen_compile.plan(Blocks().second_only(), torch.empty(3, 512, device="meta"), options=options)
    assert alone.whole_graph


def test_tied_and_shared_weights_count_once() -> None:
    model = make("gpt2", "meta")
    schedule: Schedule = hetegen_compile.plan(model, input_ids=ids(), options={"hardware": "a10-xeon"})
    assert schedule.whole_graph
    stored = sum(p.numel() * p.element_size() for p in model.parameters() if p.dim() == 2)
    assert schedule.resident_bytes < stored


def test_a_compiled_model_is_planned_as_what_it_was_made_from() -> None:
    model = make("llama", "cpu")
    plain = hetegen_compile.plan(model, input_ids=ids(), options=options_for("llama"))
    wrapped: Any = torch.compile(model, backend="eager")
    assert hetegen_compile.plan(wrapped, input_ids=ids(), options=options_for("llama")) == plain


def test_cuda_need_not_be_there_for_a_plan() -> None:
    options = {**options_for("opt"), "accelerator": "cuda"}
    assert hetegen_compile.plan(make("opt", "meta"), input_ids=ids(), options=options).rows


def test_print_schedule_prints_only_when_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    hetegen_compile.plan(Blocks(), torch.empty(3, 256, device="meta"), options=OPTIONS)
    assert capsys.readouterr().out == ""
    hetegen_compile.plan(Blocks(), torch.empty(3, 256, device="meta"), options={**OPTIONS, "print_schedule": True})
    assert "dry run, hardware a10-xeon" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gpu_memry": 1}, OptionError, "did you mean 'gpu_memory'"),
        ({"hardware": "a11-xeon"}, HardwareProfileError, "a11-xeon"),
        ({"hardware": "a10-xeon", "gpu_memory": 1000}, BudgetError, "smallest budget that works is"),
    ],
)
def test_wrong_options_are_errors(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hetegen_compile.plan(Blocks(), torch.empty(3, 256, device="meta"), options=options)


class ReadsValues(nn.Module):
    """A forward that branches on data."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x


def test_a_forward_that_reads_values_is_an_error_that_says_so() -> None:
    with pytest.raises(UnsupportedModelError, match="only a run can tell"):
        hetegen_compile.plan(ReadsValues(), torch.empty(3, device="meta"), options=OPTIONS)


def test_a_forward_without_a_graph_is_an_error() -> None:
    with pytest.raises(UnsupportedModelError, match="no graph was captured"):
        hetegen_compile.plan(nn.Identity(), torch.empty(3, device="meta"), options=OPTIONS)


def test_the_backend_names_plan_for_weights_on_meta() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Blocks(broken=False), backend="hetegen", options={"hardware": "a10-xeon"})
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="hetegen_compile.plan"):
        compiled(torch.empty(3, 256, device="meta"))


class WritesAtRandom(nn.Module):
    """Nothing keeps the two sides in step of what it writes, so it runs on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("noise", torch.zeros(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x) + x @ self.noise.normal_()  # type: ignore[operator]
        return result


def test_of_what_runs_on_the_host_as_it_is_there_is_no_plan() -> None:
    told = "there is nothing to plan: the graph runs on the host in eager mode: .*normal_"
    with pytest.raises(UnsupportedModelError, match=told):
        hetegen_compile.plan(WritesAtRandom().eval(), torch.randn(2, 64), options={"hardware": "a10-xeon"})
