"""Stage ``contact``: what CUDA does with host memory, copies and waits here, before anything relies on it."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.children import Notebook
from benchmarks.gpu.settings import Checks, Settings, device_of, require
from benchmarks.gpu.transfers import both_ways, columns_by_width, reads_by_size, uploads_behind_a_queue
from hetegen_compile.accelerators.cuda import cublas_workspace_bytes
from hetegen_compile.accelerators.cuda.pinning import SUCCESS, CudaHostMemory, cuda_view
from hetegen_compile.calibration.kernels import in_place
from hetegen_compile.host_kernels import HostKernel, kernels_for

LARGE_BYTES = 1 << 30

_NOT_CUDNNS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def contact(settings: Settings, notebook: Notebook) -> None:
    """All checks; raises ChecksFailedError at the end if one failed."""
    checks = Checks(notebook)
    checks.check("cuBLAS workspace", partial(workspace, settings))  # before any other product
    checks.check("registering", partial(registering, settings))
    checks.check("a copy from registered memory returns at once", partial(asynchronous, settings))
    checks.check("a view of pinned memory", partial(view, settings))
    checks.check("uploads behind a queue", lambda: uploads_behind_a_queue(device_of(settings)))
    checks.check("both directions at once", lambda: both_ways(device_of(settings)))
    checks.check("small uploads by size", lambda: reads_by_size(device_of(settings)))
    checks.check("columns of a matrix", lambda: columns_by_width(device_of(settings)))
    checks.check("waits and launches", partial(waits, settings))
    checks.check("attention at new lengths", partial(attention, settings))
    checks.finish()


def kernel(settings: Settings, notebook: Notebook) -> None:
    """Stage ``kernel``: build the host's kernel, most of a minute where nothing is cached, and look at it."""
    del settings
    started = time.perf_counter()
    notebook.note("kernel", best_kernel(torch.ones((64, 64), dtype=torch.bfloat16)).name)
    notebook.note("built_s", round(time.perf_counter() - started, 1))
    notebook.note("host kernels let go of the interpreter lock", interpreter_lock())


def registering(settings: Settings) -> dict[str, Any]:
    """Return codes of ``cudaHostRegister``; a refused one must not surface at a later launch."""
    device = device_of(settings)
    memory = CudaHostMemory(device)
    torch.zeros(1, device=device)
    buffer = torch.zeros(LARGE_BYTES, dtype=torch.uint8)
    address = buffer.data_ptr()
    started = time.perf_counter()
    codes = {"anonymous": memory.register(address, LARGE_BYTES)}
    seconds = time.perf_counter() - started
    codes["the same again"] = memory.register(address, LARGE_BYTES)
    codes["a part of it"] = memory.register(address + 8192, 8192)
    torch.ones(1, device=device).add_(1)
    torch.cuda.synchronize(device)
    memory.unregister(address)
    codes |= _neighbours(memory, address) | _file_mapping(memory)
    require(codes["anonymous"] == SUCCESS, f"anonymous memory was refused: {codes}")
    require(codes["the same again"] != SUCCESS, "the same range was registered twice")
    return {"codes": codes, "register_s_per_gib": seconds}


def _neighbours(memory: CudaHostMemory, address: int) -> dict[str, int]:
    """Two ranges that do not overlap but share a page."""
    codes = {"first half of a page": memory.register(address, 2048)}
    codes["second half of that page"] = memory.register(address + 2048, 2048)
    for part, code in zip((address, address + 2048), codes.values(), strict=True):
        if code == SUCCESS:
            memory.unregister(part)
    return codes


def _file_mapping(memory: CudaHostMemory) -> dict[str, int]:
    """Private and shared mappings of a file."""
    codes = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        path.write_bytes(b"\1" * (1 << 20))
        for shared in (False, True):
            mapped = torch.from_file(str(path), shared=shared, size=1 << 20, dtype=torch.uint8)
            code = memory.register(mapped.data_ptr(), 1 << 20)
            codes[f"{'shared' if shared else 'private'} file mapping"] = code
            if code == SUCCESS:
                memory.unregister(mapped.data_ptr())
    return codes


def asynchronous(settings: Settings) -> dict[str, float]:
    """A copy of registered memory is under way when its call returns."""
    device = device_of(settings)
    memory, source = CudaHostMemory(device), torch.ones(LARGE_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source, device=device)
    require(memory.register(source.data_ptr(), LARGE_BYTES) == SUCCESS, "registering failed")
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):  # the first copy of a stream sets up more than it copies
        target[:4096].copy_(source[:4096], non_blocking=True)
    torch.cuda.synchronize(device)
    try:
        started = time.perf_counter()
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            event = stream.record_event()
        returned_s, pending = time.perf_counter() - started, not event.query()
        event.synchronize()
        copied_s = time.perf_counter() - started
        require(bool((target == 1).all()), "the copy is wrong")
    finally:
        memory.unregister(source.data_ptr())
    require(returned_s < 1e-3 and pending, f"the call took {returned_s:.6f} s of {copied_s:.6f} s; pending: {pending}")
    return {"returned_s": returned_s, "copied_s": copied_s, "bytes_per_s": LARGE_BYTES / copied_s}


def view(settings: Settings) -> dict[str, float]:
    """A device view of a pinned buffer shows what the host wrote, also what it writes later."""
    device = device_of(settings)
    buffer = torch.arange(1024, dtype=torch.float32, pin_memory=True)
    seen = cuda_view(buffer, device)
    require(torch.equal((seen + 1).cpu(), buffer + 1), "the view does not show the buffer")
    torch.cuda.synchronize(device)
    buffer.fill_(5.0)
    require(torch.equal((seen * 2).cpu(), buffer * 2), "the view does not show what was written later")
    costs: dict[str, Callable[[], object]] = {
        "view_s": lambda: cuda_view(buffer, device),
        "pinned_buffer_s": lambda: torch.empty(4096, dtype=torch.uint8, pin_memory=True),
        "is_pinned_s": buffer.is_pinned,
    }
    return {name: seconds_of(work) for name, work in costs.items()}


def waits(settings: Settings) -> dict[str, float]:
    """Seconds of the host thread for what a step is made of."""
    device = device_of(settings)
    stream, x = torch.cuda.current_stream(device), torch.zeros(1, device=device)
    other, event = torch.cuda.Stream(device), torch.cuda.Event()
    rows = torch.zeros((4096, 4096), dtype=torch.bfloat16, device=device)
    token = torch.zeros((1, 4096), dtype=torch.bfloat16, device=device)
    bias = torch.zeros(4096, dtype=torch.bfloat16, device=device)

    def record_and_wait() -> None:
        event.record(stream)
        event.synchronize()

    def switch() -> None:
        with torch.cuda.stream(other):
            pass

    def switch_known() -> None:
        torch.cuda.set_stream(other)
        torch.cuda.set_stream(stream)

    works: dict[str, Callable[[], object]] = {
        "record an event and wait for it": record_and_wait,
        "make and record an event": stream.record_event,
        "stream waits for an event": lambda: other.wait_event(event),
        "enter another stream": switch,
        "set another stream and back": switch_known,
        "free memory, asked of the driver": lambda: torch.cuda.mem_get_info(device),
        "launch it with a bias (cublasLt, which torch asks for a kernel each time)": (
            lambda: torch.nn.functional.linear(token, rows, bias)
        ),
        "launch it, then add the bias": lambda: torch.nn.functional.linear(token, rows).add_(bias),
        "launch it with a bias of two dimensions (a copy, then cuBLAS)": (
            lambda: torch.addmm(bias[None], token, rows.t())
        ),
        "current stream": lambda: torch.cuda.current_stream(device),
        "launch a kernel": lambda: x.add_(1),
        "launch a Linear of one token": lambda: torch.nn.functional.linear(token, rows),
        "statistics of the allocator": lambda: torch.cuda.memory_reserved(device),
        "statistics as a dict": lambda: torch.cuda.memory_stats_as_nested_dict(device),
    }
    found = {name: seconds_of(work) for name, work in works.items()}
    torch.cuda.synchronize(device)
    return found


def workspace(settings: Settings) -> dict[str, int]:
    """What the first products reserve, without and with a bias (another library), against what the budget counts."""
    device = device_of(settings)
    torch.cuda.empty_cache()
    small = torch.zeros((64, 64), dtype=torch.bfloat16, device=device)
    before = torch.cuda.memory_reserved(device)
    found = {}
    products: dict[str, Callable[[], Tensor]] = {
        "reserved_bytes": lambda: small @ small,
        "reserved_with_bias_bytes": lambda: torch.nn.functional.linear(small, small, small[0]),
    }
    for name, product in products.items():
        product()
        torch.cuda.synchronize(device)
        found[name] = torch.cuda.memory_reserved(device) - before
    return {**found, "counted_bytes": cublas_workspace_bytes(torch.cuda.get_device_capability(device))}


def attention(settings: Settings) -> dict[str, Any]:
    """Seconds of the host's thread for one token's attention in bfloat16, at lengths that it meets for the first time
    and once more at the last of them: with the kernel that torch chooses, and without cuDNN's, which builds a plan for
    each length."""
    device = device_of(settings)
    query, keys = (torch.randn(1, 32, tokens, 128, dtype=torch.bfloat16, device=device) for tokens in (1, 512))

    def attend_s(length: int) -> float:
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.nn.functional.scaled_dot_product_attention(query, keys[:, :, :length], keys[:, :, :length])
        return time.perf_counter() - started

    choices: dict[str, tuple[AbstractContextManager[object], int]]
    choices = {"as torch chooses": (nullcontext(), 300), "without cuDNN's": (sdpa_kernel(_NOT_CUDNNS), 400)}
    figures: dict[str, Any] = {"cudnn": torch.backends.cudnn.version()}
    for name, (kernels, first) in choices.items():
        with kernels:
            _, *new = [attend_s(first + more) for more in range(6)]  # the first loads code
            figures[name] = {"new_length_s": statistics.median(new), "known_length_s": attend_s(first + 5)}
    return figures


def interpreter_lock() -> dict[str, float]:
    """The longest pause of another Python thread while host Linears run, and how long one of them takes."""
    weight = torch.ones((16384, 2048), dtype=torch.bfloat16)
    x = torch.ones((1, 2048), dtype=torch.bfloat16)
    compute = in_place(best_kernel(weight))
    gaps: list[float] = [0.0]
    done = threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not done.is_set():
            now = time.perf_counter()
            gaps[0], last = max(gaps[0], now - last), now

    thread = threading.Thread(target=tick)
    kernel_s = seconds_of(lambda: compute(x, weight), repeats=5)
    thread.start()
    try:
        for _ in range(50):
            compute(x, weight)
    finally:
        done.set()
        thread.join()
    return {"longest_pause_s": gaps[0], "kernel_s": kernel_s}


def best_kernel(weight: Tensor) -> HostKernel:
    """The last of the registry that this machine can run: our own where there is a compiler."""
    usable = [kernel for kernel in kernels_for(weight.dtype) if kernel.refusal(weight) is None]
    return usable[-1]


def seconds_of(work: Callable[[], object], repeats: int = 200) -> float:
    """Median seconds of a call on the host thread."""
    work()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found)
