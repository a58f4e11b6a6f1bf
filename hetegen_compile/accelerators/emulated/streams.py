"""Streams of the emulated accelerator: worker threads that run tasks in the order in which they were issued.

A stream of the device computes with one thread of its own. ``torch.set_num_threads`` sets the calling thread's OpenMP
pool but also the default of threads still to come (and MKL's global count), so the accelerator sets its own count
again after its workers have started: neither the main thread nor later threads are changed.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from hetegen_compile.accelerators.base import Op
from hetegen_compile.accelerators.emulated.clocks import RESOURCES
from hetegen_compile.accelerators.emulated.pacing import Pacer
from hetegen_compile.accelerators.modes import COPY_MODES, EnteredModes, Modes
from hetegen_compile.rows import Span

LONGEST_DELAY_S = 1e-3
"""Of the random delays that a seed asks for."""
_SPEEDS = (0.0, 0.1, 1.0)
"""Shares of the longest delay, one drawn for each lane: lanes that run far ahead of each other show more."""


class Delays:
    """Random delays of one lane; the same seed gives the same ones."""

    def __init__(self, seed: int, lane: int) -> None:
        self._random = random.Random(f"{seed} {RESOURCES[lane]}")
        self._longest_s = LONGEST_DELAY_S * self._random.choice(_SPEEDS)

    def sleep(self) -> None:
        """Sleep for a random time, which may be none."""
        if self._longest_s > 0.0:
            time.sleep(self._random.uniform(0.0, self._longest_s))


@dataclass(eq=False)
class Task:
    """One operation on its way to a stream.

    Attributes:
        op: the node that it belongs to.
        work: what to run (None for a mere marker); dropped before ``done`` is set, with what it holds.
        modes: torch's thread-local state to run it in.
        waits: events of other streams that must be set first.
        done: set when the task is over, also if it failed or was skipped.
        lane: the resource that is charged for it, where that is not the stream's own.
        on_failure: told what the work raised, where that does not end the step.
    """

    op: Op
    work: Callable[[], None] | None = None
    modes: Modes = COPY_MODES
    waits: tuple[threading.Event, ...] = ()
    done: threading.Event | None = None
    lane: int | None = None
    on_failure: Callable[[BaseException], None] | None = None


@dataclass
class Shared:
    """What the host thread and the workers of one accelerator share."""

    pacer: Pacer
    seed: int | None
    failure: tuple[str, BaseException] | None = None
    aborting: bool = False
    tracing: bool = False
    spans: list[Span] = field(default_factory=list)

    @property
    def skipping(self) -> bool:
        """Whether tasks are only to be passed over (one failed, or the step was aborted)."""
        return self.aborting or self.failure is not None

    def account(self, op: Op, lane: int, start_s: float) -> None:
        """An operation's work is over: sleep what its lane owes and record its span."""
        self.pacer.charge(lane, start_s, op.seconds)
        if self.tracing:
            self.spans += op.spans(RESOURCES[lane], start_s, time.perf_counter())


class Stream:
    """One worker thread and its queue; it waits only for tasks issued earlier, so it cannot deadlock."""

    def __init__(self, lane: int, shared: Shared, threads: int = 1) -> None:
        self._lane = lane
        self._shared = shared
        self._threads = threads
        self._queue: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self.delays = None if shared.seed is None else Delays(shared.seed, lane)
        self._started = threading.Event()
        self.ended = False
        self.thread = threading.Thread(target=self._run, name=f"hetegen-{RESOURCES[lane]}", daemon=True)
        self.thread.start()
        self._started.wait()

    def submit(self, task: Task) -> None:
        """Enqueue a task; returns at once."""
        self._queue.put(task)
        if self.ended:
            self._pass_over()

    def stop(self) -> None:
        """Let the thread end after what is queued; does not wait for it."""
        self._queue.put(None)

    # ---- the worker thread -----------------------------------------------------------------------------
    def _run(self) -> None:
        torch.get_num_threads()  # a thread's first query takes the process's count: before our own is set
        torch.set_num_threads(self._threads)
        modes = EnteredModes()
        self._started.set()
        task: Task | None = None
        try:
            while (task := self._queue.get()) is not None:
                self._finish(task, modes)
                task = None  # the next get() may block for long, and a task holds tensors
        finally:  # also when the thread dies: what is queued and what will be must not be waited for
            modes.leave()
            self.ended = True
            if task is not None and task.done is not None:
                task.done.set()
            if self._shared.failure is None:
                self._shared.failure = (self.thread.name, RuntimeError("the thread has ended"))
            self._pass_over()

    def _pass_over(self) -> None:
        """Set the events of everything queued without running it."""
        with suppress(queue.Empty):
            while True:
                task = self._queue.get_nowait()
                if task is not None:
                    task.work = None
                    if task.done is not None:
                        task.done.set()

    def _finish(self, task: Task, modes: EnteredModes) -> None:
        """Run a task and set its event, whatever happens: nobody may hang on a failed one."""
        try:
            for event in task.waits:
                event.wait()
            if task.work is not None and not self._shared.skipping:
                self._perform(task, task.work, modes)
        except BaseException as error:
            if task.on_failure is not None:
                task.on_failure(error)
            elif self._shared.failure is None:
                self._shared.failure = (task.op.name, error)
        finally:
            task.work = None
            if task.done is not None:
                task.done.set()

    def _perform(self, task: Task, work: Callable[[], None], modes: EnteredModes) -> None:
        if self.delays is not None:
            self.delays.sleep()
        modes.enter(task.modes)
        start_s = time.perf_counter()
        work()
        self._shared.account(task.op, self._lane if task.lane is None else task.lane, start_s)
