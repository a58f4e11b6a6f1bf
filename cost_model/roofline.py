"""Seconds from work: the roofline of each resource of a hardware profile.

An operation takes its fixed cost plus the longer of its arithmetic and its memory traffic (Williams,
Waterman, Patterson: Roofline, CACM 2009). A Linear on the host is measured rather than derived: its rate of
consuming weights falls with the number of tokens in a way that two constants do not describe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

from hetegen_compile.cost_model.hardware import HardwareProfile, LinkDirection, RateTable


def operation_s(flops: float, nbytes: float, flops_per_s: float, memory_bytes_per_s: float, launch_s: float) -> float:
    """Seconds of one operation with ``flops`` of arithmetic and ``nbytes`` of memory traffic."""
    return launch_s + max(flops / flops_per_s, nbytes / memory_bytes_per_s)


def item_bytes(dtype: str) -> float:
    """Bytes of one element by the dtype's name: the first number in it is its width in bits.

    ``bool`` has one byte; a name without a number counts as four.
    """
    bits = re.search(r"\d+", dtype)
    if bits is None:
        return 1.0 if dtype == "bool" else 4.0
    return int(bits.group()) / 8


def arithmetic_rate(flops_per_s: Mapping[str, float], dtype: str) -> float:
    """FLOP/s for a dtype; one that is not listed is computed as float32.

    Narrower types run at float32's rate (they are converted), wider ones at 4 bytes over their width: half
    for float64. A profile without float32 lends its slowest rate.
    """
    if dtype in flops_per_s:
        return flops_per_s[dtype]
    base = flops_per_s.get("float32", min(flops_per_s.values()))
    return base * min(1.0, 4.0 / item_bytes(dtype))


def linear_rate(
    tables: Mapping[str, RateTable], dtype: str, tokens: float, weight_bytes: float, ceiling: float = math.inf
) -> float:
    """Bytes of weights per second that a host Linear consumes at a number of tokens and a size of the weight.

    ``ceiling`` is the share of the table's peak that memory grants. A dtype that is not listed is computed as float32,
    as in ``arithmetic_rate``: as many elements a second, hence fewer bytes for narrower types; for wider ones the same
    bytes. Without float32 the slowest table.
    """
    if dtype in tables:
        return _granted(tables[dtype], tokens, weight_bytes, ceiling)
    width, base = _as_float32(tables, dtype)
    return width * min(_granted(table, tokens, weight_bytes / width, ceiling) for table in base)


def _as_float32(tables: Mapping[str, RateTable], dtype: str) -> tuple[float, Collection[RateTable]]:
    """For a dtype without a table: its bytes for each byte of float32, at most 1, and the tables that stand for it."""
    base = [tables["float32"]] if "float32" in tables else tables.values()
    return min(1.0, item_bytes(dtype) / 4.0), base


def _granted(table: RateTable, tokens: float, weight_bytes: float, ceiling: float) -> float:
    return min(table.at(tokens, weight_bytes), ceiling * table.peak)


def host_linear_s(
    profile: HardwareProfile,
    dtype: str,
    tokens: float,
    weight_bytes: float,
    flops: float,
    contended: bool = True,
) -> float:
    """Seconds of a Linear, or of some of its rows (``weight_bytes`` of them), on the host.

    The longer of the arithmetic bound and the weights over the measured rate. ``contended`` (uploads running at the
    same time) limits that rate to the share of the peak that they leave: DRAM bounds the sum of both, so a Linear that
    reads slowly because of its arithmetic loses nothing.
    """
    host = profile.host
    ceiling = host.contention if contended else math.inf
    rate = linear_rate(host.linear_bytes_per_s, dtype, tokens, weight_bytes, ceiling)
    return operation_s(flops, weight_bytes, arithmetic_rate(host.flops_per_s, dtype), rate, host.launch_s)


def link_lost_s(profile: HardwareProfile, dtype: str, weight_bytes: float) -> float:
    """Seconds of the link that are lost while the host reads so many bytes of weights.

    Memory serves both: while the host reads as fast as it can beside a working link, the link keeps ``contention`` of
    its rate. So in any time T in which the host reads for h seconds the link moves what takes it T - (1 - contention) h
    alone. A host that reads slowly (because of its arithmetic) takes that much in all, over a longer time.
    """
    tables, host = profile.host.linear_bytes_per_s, profile.host
    width, base = (1.0, [tables[dtype]]) if dtype in tables else _as_float32(tables, dtype)
    read_s = weight_bytes / (width * host.contention * min(table.peak for table in base))
    return (1.0 - profile.link.contention) * read_s


def accelerator_linear_s(
    profile: HardwareProfile, dtype: str, tokens: float, weight_bytes: float, flops: float
) -> float:
    """Seconds of a Linear, or of some of its rows, whose weights lie on the accelerator.

    The traffic is the weights plus the activations of a square weight of that size: for a given in * out,
    in + out is at least 2 * sqrt(in * out), so this stays a lower bound for any shape.
    """
    width = item_bytes(dtype)
    activation_bytes = 2.0 * math.sqrt(weight_bytes / width) * tokens * width
    return accelerator_op_s(profile, dtype, flops, weight_bytes + activation_bytes)


def host_op_s(profile: HardwareProfile, dtype: str, flops: float, nbytes: float) -> float:
    """Seconds of any other operation on the host."""
    host = profile.host
    rate = arithmetic_rate(host.flops_per_s, dtype)
    return operation_s(flops, nbytes, rate, host.memory_bytes_per_s, host.launch_s)


def accelerator_op_s(profile: HardwareProfile, dtype: str, flops: float, nbytes: float) -> float:
    """Seconds of any operation on the accelerator."""
    device = profile.accelerator
    rate = arithmetic_rate(device.flops_per_s, dtype)
    return operation_s(flops, nbytes, rate, device.memory_bytes_per_s, device.launch_s)


LINE_OVERHEAD_BYTES = 300
"""What each line of a 2-D copy costs beside its bytes, as bytes of a contiguous copy. Measured (H200, PCIe 5): 420 for
lines of 64 bytes, 390 for 256, 300 for 1 KiB, 260 for 4 KiB; those of schedules are of 1 KiB and more."""


def upload_s(
    profile: HardwareProfile,
    nbytes: float,
    pinned: bool = True,
    line_bytes: int | None = None,
) -> float:
    """Seconds of one transfer from host memory to the accelerator (0 for no bytes); the host reads nothing meanwhile.

    ``line_bytes``: of a 2-D copy, the bytes that lie together; None for a contiguous one.
    """
    lines = nbytes / line_bytes if line_bytes else 0.0
    return _transfer_s(profile.link.up, nbytes + lines * LINE_OVERHEAD_BYTES, pinned)


def read_up_s(profile: HardwareProfile, nbytes: float) -> float:
    """Seconds of a kernel that reads pinned host memory: the time of a small read, and the bytes at the link's rate.

    The rate is that of the largest transfers, because nothing is set up: the kernel's reads follow each other.
    """
    return profile.link.view_s + nbytes / profile.link.up.pinned.points[-1][1]


def download_s(profile: HardwareProfile, nbytes: float, pinned: bool = True) -> float:
    """Seconds of one transfer from the accelerator to host memory (0 for no bytes)."""
    return _transfer_s(profile.link.down, nbytes, pinned)


def _transfer_s(direction: LinkDirection, nbytes: float, pinned: bool) -> float:
    """The curve's rates include the start-up, so the latency is a floor and not a summand."""
    if nbytes <= 0:
        return 0.0
    curve = direction.pinned if pinned else direction.pageable
    return max(direction.latency_s, nbytes / curve.at(nbytes))
