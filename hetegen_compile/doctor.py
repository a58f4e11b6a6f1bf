"""``hetegen doctor``: what this installation and this machine offer, what is missing, and the remedy."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from hetegen_compile.accelerators.cuda import beside_allocator_bytes
from hetegen_compile.accelerators.cuda.gates import why_no_gates
from hetegen_compile.calibration import cache_path, read_profile, seems_disturbed, this_machine
from hetegen_compile.cost_model import HardwareProfile
from hetegen_compile.options import format_bytes
from hetegen_compile.registration import ENTRY_POINT, GROUP, NAME, Checkout
from hetegen_compile.system import (
    cpu_model,
    last_level_cache_bytes,
    memory_limit_bytes,
    numa_nodes,
    physical_memory_bytes,
    usable_cpus,
)

Status = Literal["ok", "warn", "problem"]

REINSTALL = "install the package: pip install hetegen, or pip install -e . in a checkout"


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, and what to do about it ("" where nothing is to do)."""

    status: Status
    subject: str
    finding: str
    remedy: str = ""


def examine() -> list[Check]:
    """All checks, in the order in which they are shown."""
    checks: tuple[Callable[[], Check], ...] = (
        _python,
        lambda: package("torch", (2, 11), untested=(2, 14)),
        lambda: package("transformers", (5,), untested=(6,)),
        _processor,
        _numa,
        _memory,
        _gpu,
        _backend,
        _compiler,
        _profile,
    )
    return [check() for check in checks]


def package(name: str, least: tuple[int, ...], *, untested: tuple[int, ...]) -> Check:
    """The installed version of a package: at least ``least``, and better below ``untested``."""
    wanted = f'pip install "{name}>={_dotted(least)},<{_dotted(untested)}"'
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check("problem", name, "not installed", wanted)
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < least:
        return Check("problem", name, f"{version} is older than {_dotted(least)}", wanted)
    if numbers >= untested:
        return Check("warn", name, f"{version} is newer than what hetegen was tested with", wanted)
    return Check("ok", name, version)


def _python() -> Check:
    """pip installs nothing on a Python that is too old."""
    return Check("ok", "Python", platform.python_version())


def _processor() -> Check:
    cores, threads = len(usable_cpus()), torch.get_num_threads()
    cache = format_bytes(last_level_cache_bytes())
    finding = f"{cpu_model()}, {cores} logical cores, {threads} thread(s) of torch, last-level cache {cache}"
    if threads > cores:
        remedy = f"torch.set_num_threads({cores}), or OMP_NUM_THREADS={cores} in the environment"
        return Check("warn", "processor", finding, remedy)
    return Check("ok", "processor", finding)


def _numa() -> Check:
    """Host Linears read weights from where they were loaded to: with several nodes mostly from one of them.

    Only what is adopted from files is spread by us.
    """
    nodes = numa_nodes(usable_cpus())
    if len(nodes) < 2:
        return Check("ok", "memory nodes", "one" if nodes else "unknown to this system")
    finding = f"{len(nodes)} are in use; a model that is not adopted from files lies on the node that loaded it"
    remedy = (
        "numactl --interleave=all spreads it over all of them; "
        f"numactl --cpunodebind={nodes[0]} --membind={nodes[0]} keeps to one (best the GPU's) if it holds the model"
    )
    return Check("warn", "memory nodes", finding, remedy)


def _memory() -> Check:
    physical, limit = physical_memory_bytes(), memory_limit_bytes()
    finding = f"{format_bytes(physical)}, control group's limit: {format_bytes(limit) if limit else 'none'}"
    if limit is not None and limit < physical:
        remedy = "larger models stream from their files, which is slower: raise the limit if you can"
        return Check("warn", "memory", finding, remedy)
    return Check("ok", "memory", finding)


def _gpu() -> Check:
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        total = torch.cuda.get_device_properties(device).total_memory
        beside = format_bytes(beside_allocator_bytes(device))
        used = f"{beside} of it used by the CUDA context and other processes"
        return Check("ok", "GPU", f"{torch.cuda.get_device_name(device)}, {format_bytes(total)}, {used}")
    finding = "none: the emulated accelerator is used; it checks semantics and says nothing about speed"
    if torch.version.cuda is None:
        return Check("warn", "GPU", finding, "to use an NVIDIA GPU, install a CUDA build of torch")
    return Check("warn", "GPU", finding, "check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES")


def _backend() -> Check:
    subject = "torch.compile backend"
    found = importlib.metadata.entry_points(group=GROUP, name=NAME)
    values = {entry.value for entry in found}
    if not values or any(isinstance(entry.dist, Checkout) for entry in found):
        finding = "not installed: torch knows the name only after import hetegen_compile"
        return Check("warn", subject, finding, REINSTALL)
    if values != {ENTRY_POINT}:
        others = ", ".join(sorted(values))
        return Check("problem", subject, f"the name hetegen means {others}", f"{REINSTALL}; remove the other")
    return Check("ok", subject, "registered as hetegen")


def _compiler() -> Check:
    """Inductor compiles what runs on the host, and its wrappers, with the compiler that it finds itself."""
    try:
        return Check("ok", "C++ compiler", get_cpp_compiler())
    except InvalidCxxCompiler:
        remedy = "install one (apt install g++, xcode-select --install) or name it in CXX"
        return Check("problem", "C++ compiler", "none was found; Inductor needs one", remedy)


def _profile() -> Check:
    cuda = torch.cuda.is_available()
    machine = this_machine(cuda=cuda)
    path = cache_path(machine)
    profile = None if path is None else read_profile(path, machine)
    if profile is not None:
        told = f"{path}{_issuing(profile) if cuda else ''}"
        if disturbed := seems_disturbed(profile):
            remedy = "hetegen calibrate again when nothing else runs"
            told += f"; probably measured while other programs were running: {disturbed}"
            return Check("warn", "measured profile", told, remedy)
        return Check("ok", "measured profile", told)
    if not cuda:
        return Check("ok", "measured profile", "none; not needed without a GPU: preset cpu-emulated")
    remedy = "hetegen calibrate measures now, else the first call does (two to three minutes)"
    return Check("warn", "measured profile", "none for this machine and version of torch", remedy)


def _issuing(profile: HardwareProfile) -> str:
    """What the profile means for decode steps on a GPU."""
    gate_us = profile.accelerator.gate_s * 1e6
    if gate_us:
        return f"; decode steps are issued ahead of the host's parts (a gate costs {gate_us:.1f} us)"
    return f"; nothing is issued ahead of the host's parts: {why_no_gates() or 'it was no faster, or not measured'}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
