"""hetegen's splits, the host alone and the device alone; other projects' ways are in ``peers``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare.job import AHEAD, HETEGEN, HOST_ROWS, IN_TURN, STREAMED, Job, Row
from benchmarks.compare.peers import accelerate_map, accelerate_offload, diffusers_groups
from benchmarks.compare.recorder import recording
from benchmarks.random_models import DTYPES, SHAPES
from hetegen_compile.bench.measure import Measured, Way, compile_anew, decode_schedule, measure_splits
from hetegen_compile.bench.timing import Timing, generate_timed, warm_and_timed, with_peak
from hetegen_compile.bench.weights import parameter_bytes, random_model
from hetegen_compile.cost_model import load_profile
from hetegen_compile.reports.schedule import Schedule

_UNPACED_TOKENS = 3


def hetegen_splits(job: Job) -> Iterator[Row]:
    """Splits of one compilation, on CUDA issued ahead and in turn; on the emulated accelerator paced."""
    started, measured = time.monotonic(), list[Measured]()
    model, prompt = _model(job), _prompt(job)
    options: dict[str, Any] = {
        "accelerator": job.accelerator, "hardware": job.hardware, "gpu_memory": job.gpu_memory,
        "context": job.prompt + job.new_tokens, "print_schedule": False, "issue_ahead": job.issue_ahead,
    }  # fmt: skip
    if job.accelerator != "cuda":
        options["pace"] = _pace(model, prompt, options, job)
    ways = own_ways(job, measured, started)
    with recording() as recorder:
        for found in measure_splits(model, prompt, job.new_tokens, options, ways, cache=job.cache):
            measured.append(found)
            schedule = found.schedule
            yield replace(
                _row(found.way, found.timing, job, found.pace, found.peak_bytes), gpu_memory=job.gpu_memory,
                note=_paced(found.pace, job) or how_issued(schedule),
                predicted_tokens_per_s=1 / schedule.predicted_step_s, floor_tokens_per_s=1 / schedule.floor_s,
                steps=tuple(map(asdict, recorder.take(len(found.timing.steps_s)))),
            )  # fmt: skip
            if found.way == HETEGEN:
                yield from _predicted(schedule, job)
                if job.trace is not None:
                    schedule.save_trace(job.trace)


def own_ways(job: Job, measured: Sequence[Measured], started_s: float) -> Iterator[tuple[str, Way]]:
    """hetegen's ways, what matters most first; the others as long as there is time for them."""
    yield HETEGEN, Way()
    ahead = bool(measured[0].schedule.trips_ahead)
    others = [(STREAMED, Way(0.0)), (HOST_ROWS, Way(1.0))]
    if job.accelerator == "cuda" and job.issue_ahead == "auto":  # what calibration has ruled out may hang: not first
        others.insert(*((0, (IN_TURN, Way(issue_ahead=False))) if ahead else (1, (AHEAD, Way(issue_ahead=True)))))
    for name, way in others:
        if job.others_s is not None and time.monotonic() - started_s > job.others_s:
            return
        yield name, way


def how_issued(schedule: Schedule) -> str:
    """How many trips of a step were a worker's."""
    return f"{schedule.trips_ahead} trips issued ahead" if schedule.trips_ahead else "issued in turn"


def cpu_inductor(job: Job) -> Iterator[Row]:
    """Inductor on the host; weights are where they are and no accelerator takes part."""
    model = _model(job)
    model.compile(backend="inductor")
    with torch.no_grad():
        yield _row("CPU, Inductor", warm_and_timed(model, _prompt(job), job.new_tokens, job.cache), job)


def eager_gpu(job: Job) -> Iterator[Row]:
    """The whole model on the device."""
    free, _ = torch.cuda.mem_get_info()
    model = _model(job)
    needed = parameter_bytes(model) * 17 // 16  # the cache of a short generation and workspaces beside the weights
    if needed > free:
        yield Row("eager GPU", note=f"does not fit: needs about {needed} bytes, {free} are free")
        return
    model.to("cuda")
    timing, peak = with_peak(lambda: warm_and_timed(model, _prompt(job).cuda(), job.new_tokens, "dynamic"))
    yield _row("eager GPU", timing, job, peak_bytes=peak)


def peer(way: str, prepare: Callable[[Any, Job], None]) -> Callable[[Job], Iterator[Row]]:
    """A way of another project: ``prepare`` puts its hooks on the model; a package that is missing says so."""

    def run(job: Job) -> Iterator[Row]:
        model = _model(job)
        try:
            prepare(model, job)
        except ModuleNotFoundError as error:
            yield Row(way, job.gpu_memory, note=f"not installed: {error.name}")
            return
        timing, peak = with_peak(lambda: warm_and_timed(model, _prompt(job).cuda(), job.new_tokens, "dynamic"))
        yield replace(_row(way, timing, job, peak_bytes=peak), gpu_memory=job.gpu_memory)

    return run


WAYS: dict[str, Callable[[Job], Iterator[Row]]] = {
    HETEGEN: hetegen_splits,
    "Accelerate": peer("Accelerate", accelerate_offload),
    "Accelerate map": peer("Accelerate map", accelerate_map),
    "diffusers": peer("diffusers", diffusers_groups),
    "eager GPU": eager_gpu,
    "CPU, Inductor": cpu_inductor,
}
"""In the order in which they run: what matters most comes first."""

LIMITED = (HETEGEN, "Accelerate map")
"""Ways that differ with the memory limit."""

EMULATED: dict[str, str] = {
    "Accelerate": "per_module",
    "CPU, Inductor": "host_only",
    "eager GPU": "resident",
}
"""Ways that cannot be emulated but predicted: the baseline of a schedule that says how long their step takes."""


def _model(job: Job) -> Any:
    return random_model(SHAPES[job.shape](), DTYPES[job.dtype])


def _prompt(job: Job) -> Tensor:
    vocabulary: int = SHAPES[job.shape]().vocab_size
    return torch.randint(4, vocabulary, (1, job.prompt), generator=torch.Generator().manual_seed(1))


def _pace(model: Any, prompt: Tensor, options: dict[str, Any], job: Job) -> float:
    """The factor by which a predicted decode step takes the job's ``step_s``."""
    compile_anew(model, options)
    generate_timed(model, prompt, _UNPACED_TOKENS, job.cache)
    return job.step_s / decode_schedule("auto").predicted_step_s


def _row(way: str, timing: Timing, job: Job, pace: float = 1.0, peak_bytes: int | None = None) -> Row:
    return Row(
        way,
        prefill_tokens_per_s=job.prompt / timing.prefill_s * pace,
        decode_tokens_per_s=pace / timing.step_s,
        decode_steps_s=tuple(step / pace for step in timing.steps_s),
        peak_bytes=peak_bytes,
        tokens=timing.tokens,
    )


def _paced(pace: float, job: Job) -> str:
    return "" if job.accelerator == "cuda" else f"emulated, paced {pace:.0f} times slower than {job.hardware}"


def _predicted(schedule: Schedule, job: Job) -> Iterator[Row]:
    """What the cost model says of ways that do not run on the emulated accelerator."""
    if job.accelerator == "cuda":
        return
    memory = load_profile(job.hardware).accelerator.memory_bytes
    for way, baseline in EMULATED.items():
        seconds = schedule.baselines.get(baseline)
        fits = f"does not fit the {memory} bytes of {job.hardware}" if baseline == "resident" else "not predicted"
        note = "cannot be emulated; predicted only" if seconds else f"cannot be emulated; {fits}"
        yield Row(way, job.gpu_memory, predicted_tokens_per_s=1 / seconds if seconds else None, note=note)
