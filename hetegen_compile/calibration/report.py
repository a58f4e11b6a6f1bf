"""A hardware profile as text, for people."""

from __future__ import annotations

import math

from tabulate import tabulate

from hetegen_compile.cost_model import HardwareProfile, HostProfile, LinkDirection, RateCurve, arithmetic_rate
from hetegen_compile.options import format_bytes


def profile_table(profile: HardwareProfile) -> str:
    """The profile as two tables: rates by dtype, and everything else with where it is from."""
    linears = profile.sources.get("host.linear_bytes_per_s", "unknown")
    return "\n\n".join((profile.description, _by_dtype(profile), f"host Linear: {linears}", _others(profile)))


def _by_dtype(profile: HardwareProfile) -> str:
    """Rates of large weights by tokens with the kernel's name, of one token by size, and of arithmetic, by dtype."""
    host, accelerator = profile.host, profile.accelerator
    tables = host.linear_bytes_per_s
    tokens = sorted({x for table in tables.values() for x, _ in table.curves[-1][1].points})
    sizes = sorted({nbytes for table in tables.values() if len(table.curves) > 1 for nbytes, _ in table.curves})
    rows: list[list[object]] = [
        [f"host Linear, {x:g} token(s), GB/s", *(_rate(host, name, x, math.inf) for name in tables)] for x in tokens
    ]
    rows += [
        [f"  1 token, weights of {format_bytes(int(size))}", *(_rate(host, name, 1, size) for name in tables)]
        for size in sizes
    ]
    for label, rates in (("host", host.flops_per_s), ("accelerator", accelerator.flops_per_s)):
        row = (f"{arithmetic_rate(rates, name) / 1e9:.4g}" for name in tables)
        rows.append([f"{label} arithmetic, GFLOP/s", *row])
    return str(tabulate(rows, headers=["", *tables], disable_numparse=True))


def _rate(host: HostProfile, dtype: str, tokens: float, nbytes: float) -> str:
    rate = f"{host.linear_bytes_per_s[dtype].at(tokens, nbytes) / 1e9:.3g}"
    return f"{rate} {host.linear_kernels[dtype].at(tokens)}" if dtype in host.linear_kernels else rate


def _others(profile: HardwareProfile) -> str:
    host, accelerator, link = profile.host, profile.accelerator, profile.link
    figures = [
        ("host memory", f"{host.memory_bytes_per_s / 1e9:.3g} GB/s", "host.memory_bytes_per_s"),
        ("host memory, size", format_bytes(host.memory_bytes), "host.memory_bytes"),
        ("host launch", _microseconds(host.launch_s), "host.launch_s"),
        ("memory's rate left during uploads", f"{host.contention:.0%}", "host.contention"),
        ("weights read ahead", format_bytes(host.ahead_bytes), "host.ahead_bytes"),
        ("accelerator memory", f"{accelerator.memory_bytes_per_s / 1e9:.4g} GB/s", "accelerator"),
        ("accelerator memory, size", format_bytes(accelerator.memory_bytes), "accelerator"),
        ("accelerator launch", _microseconds(accelerator.launch_s), "accelerator"),
        ("link up", _direction(link.up), "link"),
        ("link's rate left beside the host", f"{link.contention:.0%}", "link.contention"),
        ("link down", _direction(link.down), "link"),
        ("view of a small buffer", _microseconds(link.view_s), "link"),
        ("synchronisation", _microseconds(profile.synchronise_s), "synchronise_s"),
        ("a split Linear's fixed cost", _microseconds(profile.fixed_s_per_split), "fixed_s_per_split"),
        ("pinning", f"{profile.pin_bytes_per_s / 1e9:.3g} GB/s", "pin_bytes_per_s"),
    ]
    rows = [(label, text, _origin(profile, field)) for label, text, field in figures]
    return str(tabulate(rows, headers=["figure", "", "from"], disable_numparse=True))


def _origin(profile: HardwareProfile, field: str) -> str:
    """Whether the figure was measured, and the beginning of what its source says."""
    parents = [field.rsplit(".", depth)[0] for depth in range(field.count(".") + 1)]
    source = next((profile.sources[path] for path in parents if path in profile.sources), "unknown")
    inferred = any(path in profile.inferred for path in parents)
    return ("inferred; " if inferred else "") + (source if len(source) <= 70 else source[:67] + "...")


def _direction(direction: LinkDirection) -> str:
    return f"{_peak(direction.pinned)} pinned, {_peak(direction.pageable)} pageable GB/s"


def _peak(curve: RateCurve) -> str:
    return f"{curve.peak / 1e9:.3g}"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us"
