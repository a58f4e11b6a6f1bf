"""What hetegen costs beside the work itself: issuing a step, what lies between two, a resident model, a deep one.

    python -m benchmarks.overhead --json overhead.json

``issue``: seconds of the host thread per split Linear in a decode step of a tiny Llama, on an accelerator whose
operations return at once; torch's dispatch, the calls of segments and the check of the mirrors are in it.
``between``: seconds of the host thread per layer in a decode step with a growing cache, from where Dynamo calls the
graph to its first operation of the host and from its last one to the return: finding the plan, looking up weights and
caches, noting what is returned. What comes before and behind that, Dynamo's guards and the model's own Python, is told
beside it (``dynamo_s``).
``resident``: a model that fits, compiled by hetegen, against plain Inductor, called by turns.
``compile``: the backend's own time (Dynamo's tracing aside) by depth, with a cold Inductor cache each time.
No accelerator takes part and none is claimed: these are costs of the host. Exit status 1 if a limit is exceeded.
Where something else runs on the machine, ``--cpu-time`` takes the thread's processor time for ``issue`` and
``resident`` (with one thread nothing in them waits).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch._inductor.utils import fresh_inductor_cache
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from benchmarks.arguments import output_file
from benchmarks.null_accelerator import NullAccelerator
from hetegen_compile.accelerators import Op
from hetegen_compile.accelerators.base import NOTHING_KNOWN, StepFacts, Transfer
from hetegen_compile.backend import compile_graph
from hetegen_compile.calibration import this_machine
from hetegen_compile.compiled import CompiledGraph
from hetegen_compile.hardware import profile_for
from hetegen_compile.options import parse_options
from hetegen_compile.runtime import Runtime
from hetegen_compile.steps.segments import inductor_compiler

LIMITS = {"issue": 40e-6, "between": 80e-6, "resident": 1.15, "compile": 2.0}
"""Seconds a split Linear; seconds a layer; ratio to Inductor; ratio of the deepest to the shallowest."""

LAYER_BYTES = 12 << 10
"""Budget of the issue and compile stages, a layer of 144 KiB: most of what is not on the host is streamed."""


@dataclass(frozen=True)
class Figure:
    """One figure and the limit that it is held against.

    ``parts`` are the figures behind it, in seconds or as they are named.
    """

    stage: str
    what: str
    value: float
    limit: float
    unit: str
    parts: dict[str, float]

    @property
    def holds(self) -> bool:
        """Whether the limit is kept."""
        return self.value <= self.limit


class Stamped(NullAccelerator):
    """Notes when the host's first operation of a step begins, the embedding, and when the last of all has ended."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self.first_s: float | None = None
        self.last_s = 0.0

    def begin_step(self, carried: Sequence[Transfer] = (), facts: StepFacts = NOTHING_KNOWN) -> None:
        """The first operation is not there yet."""
        self.first_s = None

    def end_step(self) -> None:
        """There are no more."""
        self.last_s = self._clock()

    def host(self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function now."""
        if self.first_s is None:
            self.first_s = self._clock()
        return super().host(op, function, args, kwargs)


class NullBackend:
    """A hetegen backend on a ``NullAccelerator``: its graphs, the last inputs, the seconds that compiling took.

    Attributes:
        called_s, returned_s: when the last call of a graph began and ended, by ``clock``.
    """

    def __init__(
        self, accelerator: NullAccelerator | None = None, clock: Callable[[], float] = time.perf_counter, **options: Any
    ) -> None:
        self._clock = clock
        self.called_s = self.returned_s = 0.0
        self._options = parse_options({"accelerator": "emulated", "print_schedule": False, **options})
        self._profile = profile_for(self._options)
        self._runtime = Runtime(accelerator or NullAccelerator())
        self.graphs: list[CompiledGraph] = []
        self.inputs: Sequence[Any] = ()
        self.seconds = 0.0

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        started = time.perf_counter()
        graph = compile_graph(
            module, inputs, inductor_compiler, options=self._options, profile=self._profile,
            open_runtime=lambda: self._runtime,
        )  # fmt: skip
        self.seconds += time.perf_counter() - started
        assert isinstance(graph, CompiledGraph)
        self.graphs.append(graph)

        def call(*inputs: Any) -> Any:
            self.inputs, self.called_s = inputs, self._clock()
            result = graph(*inputs)
            self.returned_s = self._clock()
            return result

        return call


def llama(layers: int, width: int) -> nn.Module:
    """A Llama with random weights and a vocabulary no wider than its layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=2 * width, max_position_embeddings=64,
    )  # fmt: skip
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    return model


def one_token(model: Callable[..., Any]) -> Tensor:
    """A forward of one token without a cache."""
    result: Tensor = model(torch.ones(1, 1, dtype=torch.long), use_cache=False).logits
    return result


def issue(args: argparse.Namespace) -> Figure:
    """Seconds a split Linear: the median step over the number of split Linears."""
    model, backend = llama(args.layers, 64), NullBackend(split=0.5, gpu_memory=LAYER_BYTES * (4 + args.layers))
    model.compile(backend=backend)
    one_token(model)
    (graph,), inputs = backend.graphs, backend.inputs
    (plan,) = graph.plans
    linears = sum(row.placement == "split" for row in plan.schedule.rows)
    streamed = sum(bool(row.streamed_share) for row in plan.schedule.rows)
    assert 2 * streamed > linears, "most of the Linears have rows to prefetch"
    segments = sum(row.op == "segment" for row in plan.schedule.rows)
    steps = seconds_of_calls([lambda: graph(*inputs)], args)[0]
    step_s = statistics.median(steps)
    parts = {
        "step_s": step_s, "split_linears": linears, "streamed": streamed, "segments": segments,
        "checked_mirrors": len(plan.bound.mirrors) + len(plan.bound.residents),
    }  # fmt: skip
    return Figure("issue", "host thread per split Linear", step_s / linears, LIMITS["issue"], "s", parts)


def between(args: argparse.Namespace) -> Figure:
    """Seconds a layer that decode steps take beside their operations: the median step."""
    clock, layers, steps = clock_of(args), args.layers, args.steps + args.steps // 10
    accelerator = Stamped(clock)
    room = layers * LAYER_BYTES + 4 * (steps + 1) * layers * 256  # keys and values, old and new ones, and as many again
    backend = NullBackend(accelerator, clock, split=0.5, gpu_memory=LAYER_BYTES * 4 + room, context=steps + 1)
    model, cache = llama(layers, 64), DynamicCache()
    model.compile(backend=backend)
    token = torch.ones(1, 1, dtype=torch.long)
    before, behind, dynamo = [], [], []
    with no_collection():
        for _ in range(steps + 1):
            started = clock()
            model(token, past_key_values=cache)
            returned = clock()
            assert accelerator.first_s is not None, "a decode step begins with an embedding on the host"
            before.append(accelerator.first_s - backend.called_s)
            behind.append(backend.returned_s - accelerator.last_s)
            dynamo.append(backend.called_s - started + returned - backend.returned_s)
    plan = backend.graphs[-1].plans[0]
    before_s, behind_s, dynamo_s = (statistics.median(seconds[-args.steps :]) for seconds in (before, behind, dynamo))
    parts = {
        "before_s": before_s, "behind_s": behind_s, "dynamo_s": dynamo_s, "layers": layers,
        "checked_mirrors": len(plan.bound.mirrors) + len(plan.bound.residents),
    }  # fmt: skip
    value = (before_s + behind_s) / layers
    return Figure("between", "host thread beside a step, per layer", value, LIMITS["between"], "s", parts)


def resident(args: argparse.Namespace) -> Figure:
    """hetegen over Inductor: medians of calls by turns, both through torch.compile."""
    model = llama(4, args.width)
    backend = NullBackend()
    mine, theirs = torch.compile(model, backend=backend), torch.compile(model, backend="inductor")
    calls = [lambda: one_token(mine), lambda: one_token(theirs)]
    torch.testing.assert_close(calls[0](), calls[1](), rtol=1e-4, atol=1e-5)
    assert all(plan.schedule.whole_graph for graph in backend.graphs for plan in graph.plans)
    hetegen_s, inductor_s = map(statistics.median, seconds_of_calls(calls, args))
    parts = {"hetegen_s": hetegen_s, "inductor_s": inductor_s}
    return Figure("resident", "hetegen over Inductor", hetegen_s / inductor_s, LIMITS["resident"], "", parts)


def compile_depth(args: argparse.Namespace) -> Figure:
    """The backend's seconds for the deepest model over those for the shallowest."""
    compile_s(2)  # imports, and what Inductor finds out about the compiler
    shallow, deep = args.depths
    parts = {f"layers_{depth}_s": compile_s(depth) for depth in (shallow, deep)}
    ratio = parts[f"layers_{deep}_s"] / parts[f"layers_{shallow}_s"]
    return Figure("compile", f"{deep} layers over {shallow}", ratio, LIMITS["compile"], "", parts)


def compile_s(layers: int) -> float:
    """Seconds of the backend for one graph, Inductor's caches empty."""
    model, backend = llama(layers, 64), NullBackend(gpu_memory=LAYER_BYTES * (20 + layers))
    torch._dynamo.reset()
    with fresh_inductor_cache():
        torch.compile(one_token, backend=backend)(model)
    assert len(backend.graphs) == 1
    return backend.seconds


def seconds_of_calls(calls: Sequence[Callable[[], Any]], args: argparse.Namespace) -> list[list[float]]:
    """Seconds of each call, called by turns; the first tenth warms up and does not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    clock = clock_of(args)
    warm_up = args.steps // 10
    with no_collection():
        for _ in range(args.steps + warm_up):
            for call, found in zip(calls, seconds, strict=True):
                started = clock()
                call()
                found.append(clock() - started)
    return [found[warm_up:] for found in seconds]


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """Of the thread's processor time or of the wall."""
    return time.thread_time if args.cpu_time else time.perf_counter


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


STAGES: dict[str, Callable[[argparse.Namespace], Figure]] = {
    "issue": issue,
    "between": between,
    "resident": resident,
    "compile": compile_depth,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and print; 1 if a limit is exceeded."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        figures = [STAGES[stage](args) for stage in args.stages.split(",")]
    clock = "processor time" if args.cpu_time else "wall time"
    hardware = f"{this_machine(cuda=False)}, {args.threads} thread(s) used, {clock}"
    print(_table(figures))
    print(f"\n{hardware}; costs of the host, no accelerator takes part")
    if args.json:
        data = {"hardware": hardware, "figures": [{**asdict(one), "holds": one.holds} for one in figures]}
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    return int(not all(one.holds for one in figures))


def _table(figures: Sequence[Figure]) -> str:
    rows = [
        (one.stage, one.what, _shown(one.value, one.unit), _shown(one.limit, one.unit), "yes" if one.holds else "NO",
         ", ".join(f"{name} {value:.4g}" for name, value in one.parts.items()))
        for one in figures
    ]  # fmt: skip
    return str(tabulate(rows, headers=["stage", "what", "measured", "limit", "holds", "from"]))


def _shown(value: float, unit: str) -> str:
    return f"{value * 1e6:.1f} us" if unit == "s" else f"{value:.2f}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--stages", default=",".join(STAGES), help="which, separated by commas")
    parser.add_argument("--layers", type=int, default=24, help="layers of the models of the stages issue and between")
    parser.add_argument("--width", type=int, default=512, help="hidden size of the model of the resident stage")
    parser.add_argument("--depths", type=int, nargs=2, default=(4, 80), help="layers of the two models to compile")
    parser.add_argument("--steps", type=int, default=300, help="measured calls")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--json", type=output_file, metavar="OUT", help="write all figures to this file")
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of wall time")
    args = parser.parse_args(argv)
    unknown = [stage for stage in args.stages.split(",") if stage not in STAGES]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time sees one thread only: leave --threads at 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
