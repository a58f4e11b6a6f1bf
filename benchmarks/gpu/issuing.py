"""Stage ``issuing``: what a launch costs the host's thread behind a host Linear, by threads and by how they wait.

Between two host parts a step issues a dozen launches from a thread whose caches hold weights then, while OpenMP's other
threads wait for their next work: spinning (the default) or asleep (``OMP_WAIT_POLICY=passive``, read when a process
starts, hence a child for each way). Asleep they leave the issuing thread its core's twin, and wake up later.

Before that a small step of split layers, issued in turn and ahead of a worker.

    python -m benchmarks.gpu.issuing ARGUMENT NOTES     one child
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.children import Notebook, child_main, run_child
from benchmarks.gpu.contact import best_kernel
from benchmarks.gpu.settings import Settings, device_of
from hetegen_compile.accelerators import CudaAccelerator
from hetegen_compile.accelerators.openmp import end_own_threads
from hetegen_compile.calibration.gating import SmallModel, both_ways
from hetegen_compile.calibration.host import rotation_bytes
from hetegen_compile.calibration.kernels import Compute, cut_weights, in_place, make_arena
from hetegen_compile.calibration.timing import Effort

LAUNCHES = 12
"""About those of a layer between its host parts."""

COLUMNS = (4096,)
WEIGHT_BYTES = 64 << 20
CHILD_LIMIT_S = 20.0
_ROUNDS = 40

POLICIES = ("", "passive")


def issuing(settings: Settings, notebook: Notebook) -> None:
    """Note the figures of each way."""
    device_of(settings)
    accelerator = CudaAccelerator()
    notebook.note("small step in turn and ahead", both_ways(accelerator, SmallModel(accelerator.device))._asdict())
    accelerator.close()
    most = torch.get_num_threads()
    for policy in POLICIES:
        for threads in dict.fromkeys((most, most - 1, most // 2)):
            if threads < 1:
                continue
            name = f"{threads} threads, {policy or 'default'}"
            files = settings.path / f"issuing-{threads}-{policy or 'default'}"
            environment = {"OMP_WAIT_POLICY": policy} if policy else {}
            outcome = run_child(
                "benchmarks.gpu.issuing", {"threads": threads}, limit_s=CHILD_LIMIT_S, files=files,
                environment=environment,
            )  # fmt: skip
            notebook.note(name, outcome.notes if outcome.ok else {"reason": outcome.reason})


def measure(device: torch.device, arena_bytes: int, weight_bytes: int, rounds: int) -> dict[str, float]:
    """Median seconds of a host Linear, of a launch behind it, and of a launch in a loop of launches."""
    weights = cut_weights(make_arena(torch.bfloat16, arena_bytes), weight_bytes, COLUMNS)
    compute = in_place(best_kernel(weights[0]))
    token = torch.ones((1, COLUMNS[0]), dtype=torch.bfloat16)
    x = torch.ones((1, 64), dtype=torch.bfloat16, device=device)
    square = torch.ones((64, 64), dtype=torch.bfloat16, device=device)

    def launches() -> None:
        for _ in range(LAUNCHES):
            F.linear(x, square)

    def with_bias() -> None:
        for _ in range(LAUNCHES):
            F.linear(x, square, square[0])

    host, behind, biased, alone = [], [], [], []
    for number in range(2 * rounds):
        host.append(_seconds(lambda number=number: compute(token, weights[number % len(weights)])))  # type: ignore[misc]
        if number % 2:
            biased.append(_seconds(with_bias))
        else:
            behind.append(_seconds(launches))
    for _ in range(rounds):
        alone.append(_seconds(launches))
    seconds = statistics.median(host[1:])
    return {
        "host_s": seconds, "host_bytes_per_s": weights[0].nbytes / seconds,
        "launch_behind_it_s": statistics.median(behind[1:]) / LAUNCHES,
        "launch_with_bias_behind_it_s": statistics.median(biased[1:]) / LAUNCHES,
        "launch_in_a_loop_s": statistics.median(alone) / LAUNCHES,
        "host_on_a_worker_s": on_a_worker_s(compute, token, weights, rounds),
        "host_on_a_worker_beside_idle_threads_s": on_a_worker_s(compute, token, weights, rounds, beside=True),
    }  # fmt: skip


def on_a_worker_s(
    compute: Compute, token: torch.Tensor, weights: Sequence[torch.Tensor], rounds: int, *, beside: bool = False
) -> float:
    """Median seconds of a host Linear on another thread, with one processor less.

    The calling thread's own OpenMP threads have ended, or are ``beside`` it, idle.
    """
    threads = torch.get_num_threads()
    compute(token, weights[0])
    if not beside:
        end_own_threads()

    def loop() -> float:
        torch.set_num_threads(max(1, threads - 1))
        every = [_seconds(partial(compute, token, weights[number % len(weights)])) for number in range(rounds)]
        return statistics.median(every[1:])

    with ThreadPoolExecutor(1) as worker:
        seconds = worker.submit(loop).result()
    torch.set_num_threads(threads)  # the worker's number is the default of threads to come
    return seconds


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _child(argument: dict[str, Any], notebook: Notebook) -> None:
    torch.set_num_threads(argument["threads"])
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.no_grad():
        found = measure(device, rotation_bytes(Effort()), WEIGHT_BYTES, _ROUNDS)
    for name, value in found.items():
        notebook.note(name, value)


if __name__ == "__main__":
    sys.exit(child_main(_child))
