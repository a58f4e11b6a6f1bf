"""``calibrate``: measure this machine and make a hardware profile of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from tqdm import tqdm

from hetegen_compile.accelerators import uses_cuda
from hetegen_compile.accelerators.cuda.worker import worker_threads
from hetegen_compile.calibration import gating
from hetegen_compile.calibration.cuda import STEPS as CUDA_STEPS
from hetegen_compile.calibration.cuda import AcceleratorFigures, CudaMeter, CudaSizes, measure_cuda
from hetegen_compile.calibration.host import HostFigures, host_steps, measure_host, rotation_bytes
from hetegen_compile.calibration.machine import Machine, this_machine
from hetegen_compile.calibration.timing import Effort, plain_torch
from hetegen_compile.cost_model import SCHEMA_VERSION, HardwareProfile, load_profile
from hetegen_compile.errors import HostKernelUnavailableError
from hetegen_compile.host_kernels import VECTORISED

logger = logging.getLogger("hetegen_compile")

EMULATED_PRESET = "cpu-emulated"
"""The preset that stands in for an accelerator and a link that do not exist."""

_ACCELERATOR_FIELDS = ("accelerator", "link", "synchronise_s", "fixed_s_per_split", "pin_bytes_per_s")

Step = Callable[[str], None]


def calibrate(*, accelerator: str = "auto", progress: bool = True, effort: Effort | None = None) -> HardwareProfile:
    """Measure this machine, which takes about 40 s, with a GPU two to three minutes.

    Args:
        accelerator: "cuda" measures the current CUDA device and the link too; "emulated" takes their figures
            from the preset "cpu-emulated", and the profile says so; "auto" is CUDA where there is a device.
        progress: show a progress bar on standard error.
        effort: how much is measured.

    Raises:
        AcceleratorUnavailableError: "cuda" without a device.
        OptionError: another ``accelerator``.
    """
    cuda = uses_cuda(accelerator)
    chosen = effort or Effort()
    steps = host_steps(chosen) + (CUDA_STEPS + 1 if cuda else 0)
    with plain_torch(), _progress(steps, show=progress) as step:
        if cuda:
            return _calibrate_cuda(chosen, step)
        return _calibrate_host(chosen, step)


def _calibrate_host(effort: Effort, step: Step) -> HardwareProfile:
    preset = load_profile(EMULATED_PRESET)
    figures = AcceleratorFigures(
        preset.accelerator,
        preset.link,
        preset.synchronise_s,
        preset.fixed_s_per_split,
        preset.pin_bytes_per_s,
    )
    sources = {
        field: f"not measured, there is no GPU: preset {EMULATED_PRESET}: {preset.sources[field]}"
        for field in _ACCELERATOR_FIELDS
    }
    sources["host.contention"] = (
        "measured while one more thread copies main memory (there is no link): it takes a processor too, so "
        "the share is rather too low"
    )
    host = measure_host(effort, None, step)
    inferred = (*_ACCELERATOR_FIELDS, "host.contention")
    return _profile(this_machine(cuda=False), effort, host, figures, sources, inferred)


def _calibrate_cuda(effort: Effort, step: Step) -> HardwareProfile:
    """Host, device and link."""
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.autocast("cuda", enabled=False):
        meter = CudaMeter(device, effort, CudaSizes())
        figures = measure_cuda(meter, step)
        step("gates")
        torch.cuda.empty_cache()
        with contextlib.suppress(HostKernelUnavailableError):  # built here: the other process has no time for that
            VECTORISED.prepare()
        gates = gating.ask(device)  # nothing of this process uses the device meanwhile
        threads = torch.get_num_threads()
        threads = worker_threads(threads) if gates.gate_s else threads  # else the host's thread computes with all
        host = measure_host(effort, meter.load, step, threads)
    del meter
    torch.cuda.empty_cache()  # what stays reserved would count against the budget of the model
    figures = replace(
        figures,
        accelerator=replace(figures.accelerator, gate_s=gates.gate_s),
        link=replace(figures.link, contention=host.copies),
    )
    measured = "measured by hetegen calibrate with CUDA events and blocking copies, medians"
    sources = {field: measured for field in _ACCELERATOR_FIELDS}
    sources["host.contention"] = f"measured while pinned uploads run, with {threads} threads, as in a step"
    sources["link.contention"] = "measured: pinned uploads while these Linears are computed"
    sources["accelerator"] = f"{measured}; gates: {gates.source}"
    return _profile(this_machine(cuda=True), effort, host, figures, sources, ())


def _profile(
    machine: Machine,
    effort: Effort,
    host: HostFigures,
    figures: AcceleratorFigures,
    sources: dict[str, str],
    inferred: tuple[str, ...],
) -> HardwareProfile:
    return HardwareProfile(
        schema_version=SCHEMA_VERSION,
        name=machine.profile_name,
        description=f"Measured by hetegen calibrate: {machine}",
        host=host.profile,
        accelerator=figures.accelerator,
        link=figures.link,
        synchronise_s=figures.synchronise_s,
        fixed_s_per_split=figures.fixed_s_per_split,
        pin_bytes_per_s=figures.pin_bytes_per_s,
        sources=_host_sources(effort, host) | sources,
        inferred=inferred,
    )


def _host_sources(effort: Effort, host: HostFigures) -> dict[str, str]:
    kernels = ". ".join(f"{dtype}: {text}" for dtype, text in host.comparison.items())
    sizes = ", ".join(f"{nbytes / 2**20:g}" for nbytes in effort.weight_bytes)
    columns = ", ".join(map(str, effort.columns))
    return {
        "host.cores": "threads of torch",
        "host.flops_per_s": f"measured: the fastest of a Linear of {effort.square}^3 and those below",
        "host.memory_bytes_per_s": "measured: a copy with all threads, read and written bytes",
        "host.linear_bytes_per_s": (
            f"measured: the fastest kernel's medians, rotating over {rotation_bytes(effort) >> 20} MiB of weights of "
            f"{sizes} MiB with {columns} columns; above {effort.sized_tokens} tokens one size. GB/s of the largest "
            f"weights: {kernels}"
        ),
        "host.linear_kernels": "measured: the fastest kernel that needs no copy of the weights",
        "host.ahead_bytes": host.ahead.source,
        "host.launch_s": "measured: F.linear on 16 x 16",
        "host.memory_bytes": "main memory, or the control group's limit where that is lower",
    }


@contextlib.contextmanager
def _progress(steps: int, *, show: bool) -> Iterator[Step]:
    """A callable that says what is measured next, shown as a progress bar."""
    with tqdm(total=steps, desc="calibrating", disable=not show) as bar:

        def step(name: str) -> None:
            logger.debug("calibrating: %s", name)
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        yield step
