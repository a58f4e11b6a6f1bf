"""What a machine can do: rates and fixed costs of the host, the accelerator and the link between them.

Plain data with units in the names (``_bytes``, ``_s``, ``_bytes_per_s``, ``_flops_per_s``). The annotations
carry the admissible range of each number; ``profile_json`` reads, checks and writes profiles by them, so a
new figure is one more line here and one more in each preset. A field with a default may be left out of a file.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated

from hetegen_compile.errors import HardwareProfileError

SCHEMA_VERSION = 1
"""Version of the profile's fields. Fields that may be left out, and further forms of a field, do not raise it."""


@dataclass(frozen=True)
class Bounds:
    """The range of a number in a profile: ``low`` (excluded unless ``low_included``) to ``high``."""

    low: float
    high: float
    low_included: bool = False


Rate = Annotated[float, Bounds(0.0, 1e24)]
Seconds = Annotated[float, Bounds(0.0, 1e6, low_included=True)]
Share = Annotated[float, Bounds(0.0, 1.0)]
Count = Annotated[int, Bounds(1, 2**62, low_included=True)]
CountOrZero = Annotated[int, Bounds(0, 2**62, low_included=True)]


@dataclass(frozen=True)
class RateCurve:
    """A rate that depends on a size: points ``(x, rate)``, x strictly increasing, all positive and finite.

    Raises HardwareProfileError if the points are none, unsorted, or not positive and finite.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        """Check the points once, so that ``at`` need not."""
        if not self.points:
            raise HardwareProfileError("a rate curve has no points; give at least one [x, rate]")
        for index, (x, rate) in enumerate(self.points):
            if not (0.0 < x < math.inf and 0.0 < rate < math.inf):
                raise HardwareProfileError(f"point {index} is ({x}, {rate}); give positive, finite numbers")
            if index and x <= self.points[index - 1][0]:
                previous = self.points[index - 1][0]
                raise HardwareProfileError(f"point {index} has x = {x} after {previous}; sort by x")

    @staticmethod
    def constant(rate: float) -> RateCurve:
        """The curve that has this rate at every size."""
        return RateCurve(((1.0, rate),))

    def at(self, x: float) -> float:
        """The rate at ``x``: linear in the logarithms between points, the end's rate beyond the ends."""
        position = bisect_right(self.points, x, key=lambda point: point[0])
        if position == 0:
            return self.points[0][1]
        if position == len(self.points):
            return self.points[-1][1]
        (x0, rate0), (x1, rate1) = self.points[position - 1], self.points[position]
        weight = math.log(x / x0) / math.log(x1 / x0)
        return rate0 * math.exp(weight * math.log(rate1 / rate0))

    @property
    def peak(self) -> float:
        """The largest rate."""
        return max(rate for _, rate in self.points)


@dataclass(frozen=True)
class RateTable:
    """A rate that depends on the number of tokens and on the bytes of the weight: a curve over tokens by bytes.

    ``curves`` are pairs (bytes, curve) with bytes strictly increasing; one curve holds for every size. In a profile
    file one curve is its list of points, a table a list of ``{"weight_bytes": ..., "points": [...]}``.

    Raises HardwareProfileError if there is no curve, or the bytes are not positive, finite and increasing.
    """

    curves: tuple[tuple[float, RateCurve], ...]

    def __post_init__(self) -> None:
        """Check the sizes once, so that ``at`` need not."""
        if not self.curves:
            raise HardwareProfileError("a rate table has no curves; give at least one")
        for index, (nbytes, _) in enumerate(self.curves):
            if not 0.0 < nbytes < math.inf:
                raise HardwareProfileError(f"curve {index} is for {nbytes} bytes; give a positive, finite number")
            if index and nbytes <= self.curves[index - 1][0]:
                previous = self.curves[index - 1][0]
                raise HardwareProfileError(f"curve {index} is for {nbytes} bytes after {previous}; sort by bytes")

    @staticmethod
    def of(curve: RateCurve) -> RateTable:
        """The table that has this curve at every size."""
        return RateTable(((1.0, curve),))

    def at(self, tokens: float, nbytes: float) -> float:
        """The rate at a number of tokens and a size: linear in the logarithms, the end's rate beyond the ends."""
        sizes = [size for size, _ in self.curves]
        position = bisect_right(sizes, nbytes)
        near = self.curves[max(0, position - 1) : position + 1]
        return RateCurve(tuple((size, curve.at(tokens)) for size, curve in near)).at(nbytes)

    @property
    def peak(self) -> float:
        """The largest rate: reading weights at the speed of memory."""
        return max(curve.peak for _, curve in self.curves)


@dataclass(frozen=True)
class KernelChoice:
    """Which host kernel was the fastest, by number of tokens: points ``(tokens, name)``, tokens increasing.

    Between two points the nearer one (in the logarithm) decides.

    Raises HardwareProfileError if the points are none, or the tokens are not positive, finite and increasing.
    """

    points: tuple[tuple[float, str], ...]

    def __post_init__(self) -> None:
        """Check the tokens as a curve's."""
        RateCurve(tuple((tokens, 1.0) for tokens, _ in self.points))

    def limits(self) -> tuple[tuple[float, str], ...]:
        """(highest number of tokens, name) of each run of equal names; the last one's is infinite."""
        tokens = [tokens for tokens, _ in self.points]
        highest = [math.sqrt(low * high) for low, high in pairwise(tokens)] + [math.inf]
        runs = {index: name for index, (_, name) in enumerate(self.points)}
        last = [i for i in runs if i + 1 == len(runs) or runs[i + 1] != runs[i]]
        return tuple((highest[i], runs[i]) for i in last)

    def at(self, tokens: float) -> str:
        """The kernel's name at a number of tokens."""
        return next(name for most, name in self.limits() if tokens <= most)


@dataclass(frozen=True)
class HostProfile:
    """The processor and its memory.

    Attributes:
        name: processor.
        cores: physical cores that compute.
        flops_per_s: sustained arithmetic rate by dtype name ("float32", "bfloat16", ...).
        memory_bytes_per_s: sustained rate of reading and writing main memory.
        linear_bytes_per_s: by dtype, bytes of weights per second that a Linear consumes, by the number of tokens and
            the bytes of the rows that are computed; ``launch_s`` is not in it.
        launch_s: fixed cost of one host operation.
        contention: share of the rate of reading weights at the speed of memory that remains while uploads use the
            same memory. Slower Linears, which arithmetic limits, leave the memory idle anyway.
        memory_bytes: size of main memory.
        linear_kernels: by dtype, the host kernels that ``linear_bytes_per_s`` belongs to and the runtime uses; empty:
            ``F.linear``.
        ahead_bytes: of weights that are worth reading into the caches before the activations are there; 0: none, or not
            measured. Predictions know nothing of it.
    """

    name: str
    cores: Count
    flops_per_s: Mapping[str, Rate] = field(hash=False)
    memory_bytes_per_s: Rate
    linear_bytes_per_s: Mapping[str, RateTable] = field(hash=False)
    launch_s: Seconds
    contention: Share
    memory_bytes: Count
    linear_kernels: Mapping[str, KernelChoice] = field(default_factory=dict, hash=False)
    ahead_bytes: CountOrZero = 0


@dataclass(frozen=True)
class AcceleratorProfile:
    """The accelerator: arithmetic by dtype, its memory's rate and size, and what issuing to it takes.

    Attributes:
        name: of the device.
        flops_per_s: sustained arithmetic rate by dtype name.
        memory_bytes_per_s: sustained rate of reading and writing its memory.
        launch_s: from one launch of a small kernel to the next, when one thread issues nothing else.
        memory_bytes: size of its memory.
        issue_s: what issuing a Linear costs the host thread, all that Python and torch do for it included; 0:
            ``launch_s``.
        segment_issue_s: the same of a compiled segment; 0: ``issue_s``.
        gate_s: what closing its stream costs the host thread until a worker opens it (``passes.issue_ahead``); 0: not
            measured, or what is issued behind one is not done sooner.
    """

    name: str
    flops_per_s: Mapping[str, Rate] = field(hash=False)
    memory_bytes_per_s: Rate
    launch_s: Seconds
    memory_bytes: Count
    issue_s: Seconds = 0.0
    segment_issue_s: Seconds = 0.0
    gate_s: Seconds = 0.0

    def issuing_s(self, *, segment: bool) -> float:
        """Seconds of the host thread for issuing a compiled segment, or a Linear."""
        one_s = self.issue_s or self.launch_s
        return (self.segment_issue_s or one_s) if segment else one_s


@dataclass(frozen=True)
class LinkDirection:
    """One direction of the link; both rates are curves over the bytes of one transfer, start-up included.

    Attributes:
        pinned: bytes per second from or to pinned host memory.
        pageable: the same with pageable host memory (staged by the driver).
        latency_s: the shortest time that any transfer takes.
    """

    pinned: RateCurve
    pageable: RateCurve
    latency_s: Seconds


@dataclass(frozen=True)
class LinkProfile:
    """Both directions.

    Attributes:
        up, down: host to accelerator and back.
        view_s: a kernel reading a small pinned activation without a copy.
        contention: share of the rate of long pinned transfers up that remains while the host reads weights from the
            same memory as fast as it can (``link_lost_s``).
    """

    up: LinkDirection
    down: LinkDirection
    view_s: Seconds
    contention: Share = 1.0


@dataclass(frozen=True)
class HardwareProfile:
    """One machine, with the source of every figure.

    Attributes:
        schema_version: version of these fields, ``SCHEMA_VERSION`` when written by this code.
        name, description: for people.
        host, accelerator, link: the three parts.
        synchronise_s: the host waiting once for the device.
        fixed_s_per_split: measured overhead of one split Linear over an unsplit one, its trip down and up included.
            Linears that share a trip cost it once: what it holds beyond the trip's own tasks is the host thread's.
        pin_bytes_per_s: rate of copying pageable memory into pinned memory.
        sources: field path ("host.linear_bytes_per_s") -> where the figures at and below it are from.
        inferred: field paths whose figures are inferred, not measured or published.
    """

    schema_version: Count
    name: str
    description: str
    host: HostProfile
    accelerator: AcceleratorProfile
    link: LinkProfile
    synchronise_s: Seconds
    fixed_s_per_split: Seconds
    pin_bytes_per_s: Rate
    sources: Mapping[str, str] = field(hash=False)
    inferred: tuple[str, ...]
