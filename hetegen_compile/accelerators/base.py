"""What an accelerator is to the compiler: streams, slots, copies and launches behind one interface.

A bound schedule is straight-line code that calls these methods in issue order, from one host thread.
Three streams exist on every accelerator and stay inside it: ``compute`` (segments, Linears, joins), ``up``
(prefetches and uploads) and ``down`` (downloads). Beside them the pin thread copies rows of weights that are
not pinned into a ring of pinned host memory, and the worker computes what is given to it ahead of its operands.
Ordering between them is what the operations say and nothing else:

    stage           the pin thread waits for each prefetch in ``after``, then copies rows into the pinned slot

    prefetch        up waits for each token in ``after`` and for the stage that it reads (if it reads one), then
                    copies rows into the slot; a pinned slot that it read is free again
    wait            compute waits for that transfer                        (read after write)
    release         the slot may be overwritten once compute got here       (write after read)
    prefetch_ahead  a prefetch that the next step takes over in ``begin_step``
    to_host         down waits for what compute has issued so far, then copies
    wait_host       the host thread blocks until that download is done
    to_accelerator  host tensors become readable by compute after ``wait``, all of them in one transfer
    new_cache       memory for a cache and more of its tokens, which a launch behind it fills
    lengthen        a longer cache in the same memory; the same
    launch          compute runs a function over device values
    launch_chain    compute runs a chain of launches, in their order

    receive         the worker waits until that download is done
    host_ahead      the worker runs a function, behind everything that was given to it before
    deliver         the worker sends its results up; they are readable by compute after ``wait``, which closes the
                    stream (a gate) until they are there
    caught_up       the host thread blocks until the worker has sent that

A *promise* stands for what the worker will have; only ``host_ahead`` and ``deliver`` take one, or an item of one.
A *value* is whatever the accelerator passes around for a device tensor: a ``torch.Tensor`` on CUDA, a
future on the emulated accelerator. Only the accelerator looks inside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch

from hetegen_compile.accelerators.counters import Counters
from hetegen_compile.rows import Span

Value = Any
Token = Any
Transfer = Any
Slot = Any
Promise = Any


@dataclass(frozen=True)
class Op:
    """One operation of a bound schedule, as the accelerator needs to know it.

    ``name`` is the node's name (errors, traces), ``seconds`` what the cost model predicts for it on the
    stated hardware and ``issue_s`` for issuing it (pacing), ``category`` what its bytes are counted under,
    ``workspace_bytes`` what it occupies while it runs beside its arguments and results. ``tensors`` are the positions
    of a launch's arguments that are tensors in the schedule: None there is a value that was lost, and not a bias that
    does not exist. ``parts`` are the names of the nodes that it stands for, if they are several, and ``shares`` tells
    how its last run's time was shared out among them.
    """

    name: str
    seconds: float = 0.0
    category: str = "activations"
    workspace_bytes: int = 0
    tensors: tuple[int, ...] = ()
    issue_s: float = 0.0
    parts: tuple[str, ...] = ()
    shares: Callable[[], Sequence[float]] | None = None

    def spans(self, resource: str, start_s: float, end_s: float) -> list[Span]:
        """What a trace shows of a run of it that is over: each of its parts."""
        if self.shares is None:
            return [Span(self.name, resource, start_s, end_s)]
        ends = list(accumulate((share * (end_s - start_s) for share in self.shares()), initial=start_s))
        return [Span(part, resource, *times) for part, times in zip(self.parts, pairwise(ends), strict=True)]


@dataclass(eq=False)
class LaunchChain:
    """Launches of a bound schedule that follow each other and are the same in each step but for what tensors hold.

    Attributes:
        name: of the first of them.
        function: launches all of them. It takes a list of values, which it empties so that each dies behind its last
            reader, and returns those that the step goes on with.
        written: positions of the values that the step writes in place, in the chain or behind it.
        made: positions of the values that other chains of the step give.
        recorded: what an accelerator keeps of it, for as long as the step exists.
    """

    name: str
    function: Callable[[list[Any]], tuple[Any, ...]]
    written: tuple[int, ...] = ()
    made: tuple[int, ...] = ()
    recorded: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class StepFacts:
    """What is known of a step before it begins.

    Attributes:
        again: it has ended well when it last ran, and what it issues behind gates had the same sizes, so that has been
            loaded.
        needs_bytes: the most that it may allocate.
        chains: those that it launches.
        in_turn: nothing in it is the worker's.
    """

    again: bool = False
    needs_bytes: int = 0
    chains: Sequence[LaunchChain] = ()
    in_turn: bool = False


NOTHING_KNOWN = StepFacts()


def call_on_host(op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``function(*args, **kwargs)``; what it raises is raised as it is in eager, with a note that names the node."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        error.add_note(f"raised by the host operation {op.name} of hetegen's schedule")
        raise


class Accelerator(ABC):
    """One device, its three streams and the pin thread; see the module's docstring for what each operation orders."""

    kind: str
    """``"cuda"`` or ``"emulated"``."""
    device: torch.device
    """Where example values of segments live: ``cuda:0``, or ``cpu`` for the emulated accelerator."""
    counters: Counters
    memory_bytes: int
    """Bytes of device memory that may be used at all (free memory on CUDA, the profile's when emulated)."""

    @property
    def usable(self) -> bool:
        """Whether work can be given to it; if not, every method raises AcceleratorError with the reason."""
        return True

    @property
    def cannot_issue_ahead(self) -> str:
        """Why it takes no work ahead of the host's parts (``receive`` and what follows it); "" says that it does."""
        return ""

    @property
    def cannot_record(self) -> str:
        """Why it issues chains launch by launch although it would record them, found when it tried; "" as a rule."""
        return ""

    # ---- memory ------------------------------------------------------------------------------------
    @abstractmethod
    def upload(self, op: Op, source: torch.Tensor, *, into: Value | None = None) -> Value:
        """Copy a host tensor up (same geometry: dtype, size, stride), ordered before later compute work.

        On return the source may be overwritten by the host. ``into`` (a value of the same geometry that was
        made by an earlier upload) is overwritten in place instead of allocating.
        """

    @abstractmethod
    def download(self, op: Op, value: Value) -> torch.Tensor:
        """Copy a device value down into a new ordinary host tensor; blocks until it is complete."""

    @abstractmethod
    def share_memory(self, one: Value, other: Value) -> bool:
        """Whether two values lie in one allocation; blocks until they are there if nobody knows before."""

    @abstractmethod
    def limit_memory(self, nbytes: int) -> None:
        """Hold at most ``nbytes`` from now on, the ring included: what would exceed it is an AcceleratorMemoryError."""

    @abstractmethod
    def available_bytes(self) -> int:
        """Bytes that could be held now: what is held and what is free."""

    def overhead_bytes(self) -> Mapping[str, int]:
        """What the device's libraries take beside what this interface allocates, item by item."""
        return {}

    @property
    def beside_bytes(self) -> int:
        """Bytes of the device in use beside the process's allocator: the driver's context, other processes."""
        return 0

    @abstractmethod
    def reserve_ring(self, nbytes: int) -> None:
        """Make the staging ring ``nbytes`` long (synchronises if its length changes; what it held is lost)."""

    @abstractmethod
    def slot(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        """A view of the staging ring, prepared once at bind time; offsets are multiples of 256 bytes."""

    @abstractmethod
    def pin(self, owner: object, address: int, nbytes: int) -> int:
        """Pin host memory in place, so that prefetches from it are asynchronous, until ``owner`` dies.

        Returns 0 if the bytes are pinned now (at once or before), else the driver's error code.
        """

    @abstractmethod
    def abandon_step(self) -> None:
        """The host left the step by an exception: pass over what is queued, let go of what the step held, and undo
        what it set process-wide. Nothing happens outside a step."""

    @abstractmethod
    def reserve_pinned(self, nbytes: int) -> None:
        """Make the pinned ring on the host at least ``nbytes`` long (synchronises if it has to grow)."""

    @abstractmethod
    def pinned_slot(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
        """A view of the pinned ring, prepared once at bind time; offsets are multiples of 256 bytes."""

    @property
    @abstractmethod
    def pinned_bytes(self) -> int:
        """Host bytes that are pinned now: in place, and the pinned ring."""

    # ---- operations of a schedule --------------------------------------------------------------------
    @abstractmethod
    def begin_step(self, carried: Sequence[Transfer] = (), facts: StepFacts = NOTHING_KNOWN) -> None:
        """Order everything of this step after everything of the step before (the ring is free again).

        ``carried`` are results of ``prefetch_ahead`` that are still held (see ``holds``): from here on they are
        waited for and released like prefetches of this step. Those not among them are given up; their bytes of
        the ring may be overwritten.
        """

    @abstractmethod
    def end_step(self) -> None:
        """Block until everything but prefetches for the next step is over; raise what a stream's work raised."""

    @abstractmethod
    def stage(self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[Transfer]) -> Transfer:
        """Start copying ``source`` (rows of a host weight, or columns of one) into a slot of the pinned ring.

        ``after`` are the prefetches that read what the slot's bytes held before.
        """

    @abstractmethod
    def prefetch(self, op: Op, source: torch.Tensor | Transfer, slot: Slot, after: Sequence[Token]) -> Transfer:
        """Start copying ``source`` into ``slot`` on the up stream.

        ``source`` is rows of a host weight, columns of one (a 2-D copy), or the ``stage`` that copies them into the
        pinned ring;
        each stage is read by one prefetch.
        """

    @abstractmethod
    def prefetch_ahead(self, op: Op, source: torch.Tensor, slot: Slot, after: Sequence[Token]) -> Transfer:
        """Start a prefetch for the next step.

        ``source`` may die before the copy is over, which is then completed first. What fails in the copy is raised
        in the next step, naming ``op``.
        """

    @abstractmethod
    def holds(self, transfer: Transfer) -> bool:
        """Whether a result of ``prefetch_ahead`` can be given to ``begin_step``.

        Not after an aborted step, after the ring has grown, or once it was taken over or given up.
        """

    @abstractmethod
    def wait(self, op: Op, transfer: Transfer) -> Value:
        """Order later compute work after ``transfer``; the value of a prefetch, the list of those of a
        ``to_accelerator``."""

    @abstractmethod
    def release(self, op: Op, transfer: Transfer) -> Token:
        """All readers of the prefetched slot are issued; the token lets a later prefetch overwrite it."""

    @abstractmethod
    def to_host(self, op: Op, value: Value | Sequence[Value]) -> Transfer:
        """Start copying ``value`` down; it is kept alive and must not be written until ``wait_host``.

        A list or tuple of values goes down as one transfer, whose ``wait_host`` returns a list.
        """

    @abstractmethod
    def wait_host(self, op: Op, transfer: Transfer) -> Any:
        """Block the host until the download is complete and return its (new) host tensor, or list of them."""

    @abstractmethod
    def to_accelerator(self, op: Op, tensors: Sequence[torch.Tensor]) -> Transfer:
        """Start making host tensors readable by compute, as one transfer whose ``wait`` returns a list.

        They must not be written before the step's end.
        """

    @abstractmethod
    def new_cache(self, op: Op, like: torch.Tensor, tokens: int) -> Value:
        """An uninitialised cache of the sizes and dtype of ``like``, [sequences, heads, tokens, width], laid out token
        by token at the beginning of new memory for ``tokens`` of them (at least those that it has)."""

    @abstractmethod
    def lengthen(self, op: Op, value: Value, tokens: int) -> Value:
        """A cache that begins as ``value`` does and has ``tokens`` more, in the memory behind it; nothing is copied.

        What is new in it is undefined until a launch has written it.

        Raises:
            ScheduleError: there is no room behind ``value``, or somebody has had it.
        """

    def close_no_gates(self) -> None:  # noqa: B027, an accelerator may keep to it anyway
        """The step takes memory beside what ``begin_step`` was told of, so nothing is issued behind closed gates.

        Only a device whose driver waits for gates has to do anything.
        """

    @abstractmethod
    def launch(
        self,
        op: Op,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        outputs: int | None = None,
        mutates: tuple[int, ...] = (),
    ) -> Any:
        """Run ``function(*args)`` on the compute stream.

        ``args`` may hold values (also inside lists and tuples), numbers and None. ``outputs=None``: the function
        returns one tensor and so does this; ``outputs=n``: it returns a sequence of n, and this a list of n
        values (an entry may be a non-tensor only if it does not depend on device data). ``mutates`` are the
        positions of arguments that the function writes in place.
        """

    def launch_chain(self, chain: LaunchChain, given: list[Value]) -> tuple[Any, ...]:
        """Launch all of ``chain`` on ``given`` values; the list is emptied, so that they may die on the way."""
        return chain.function(given)

    @abstractmethod
    def host(self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``function`` on the host thread, now. Device values among the arguments are an error."""

    # ---- operations of the worker ----------------------------------------------------------------------
    @abstractmethod
    def receive(self, op: Op, transfer: Transfer) -> Promise:
        """The worker waits for a download; the promise is of its host tensor, or list of them.

        The issuing thread may wait for the same download itself, once.
        """

    @abstractmethod
    def host_ahead(
        self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Promise:
        """As ``host``, on the worker and not now; ``args`` and ``kwargs`` may hold promises, also in lists and tuples.

        What it raises is raised by the next call that waits for the worker; what was given to it behind is not done.
        """

    @abstractmethod
    def deliver(self, op: Op, promises: Sequence[Promise], like: Sequence[torch.Tensor]) -> Transfer:
        """As ``to_accelerator``, of results of the worker, which are as ``like`` (meta tensors) and small.

        At most ``ir.VIEWED_UPLOAD_BYTES``: the accelerator reads them where they lie.
        """

    @abstractmethod
    def caught_up(self, op: Op, transfer: Transfer) -> None:
        """Block the host until the worker has done everything up to this ``deliver``; raise what it has raised."""

    # ---- life --------------------------------------------------------------------------------------
    @abstractmethod
    def synchronize(self) -> None:
        """Block until every stream is idle."""

    @abstractmethod
    def trace(self, enabled: bool) -> list[Span]:
        """Switch recording of spans on or off; returns what was recorded so far and forgets it."""

    @abstractmethod
    def rest(self) -> None:
        """Stop threads and free slots for the time that nobody needs them: the next work starts and makes them again.

        Between steps only. What is pinned in place stays so as long as its owner lives.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop threads, free slots, unpin memory. The accelerator cannot be used afterwards."""
