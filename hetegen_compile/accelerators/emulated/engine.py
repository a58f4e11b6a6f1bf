"""The emulated accelerator's threads and their life: steps, aborts, failures, the end."""

from __future__ import annotations

import os
import threading
import time
import weakref
from dataclasses import replace

import torch

from hetegen_compile.accelerators.base import Op
from hetegen_compile.accelerators.emulated.clocks import COMPUTE, DOWN, HOST, PIN, UP, WORKER
from hetegen_compile.accelerators.emulated.pacing import Pacer
from hetegen_compile.accelerators.emulated.streams import Delays, Shared, Stream, Task
from hetegen_compile.accelerators.switching import QuickSwitching
from hetegen_compile.errors import AcceleratorError, AcceleratorMemoryError, ScheduleError
from hetegen_compile.rows import Span

LONGEST_JOIN_S = 5.0


class HostFailure(Exception):
    """What an operation of the host raised on the worker: whoever waits raises it as it is."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Engine:
    """The streams' threads; what fails on one of them is kept, and what is queued after it is passed over."""

    def __init__(self, pace: float | None, seed: int | None) -> None:
        self.paced = pace is not None
        self._shared = Shared(Pacer(pace), seed)
        self._last_upload = threading.Event()
        self._last_upload.set()
        self._pid = os.getpid()
        self._switching = QuickSwitching()
        self.in_step = False
        self._host_delays = None if seed is None else Delays(seed, HOST)
        self._closed = False
        self._streams: dict[int, Stream] = {}
        self._start()

    def _start(self) -> None:
        threads = torch.get_num_threads()
        streams = {lane: Stream(lane, self._shared) for lane in (COMPUTE, UP, DOWN, PIN)}
        streams[WORKER] = Stream(WORKER, self._shared, threads)
        torch.set_num_threads(threads)  # see the docstring of ``streams``
        self._stop = weakref.finalize(self, _stop_streams, self._shared, list(streams.values()))
        self._streams = streams

    def check_usable(self) -> None:
        """Raise AcceleratorError after close, in a forked child (which has no threads), and if a thread has died."""
        reason = self.why_unusable()
        if reason is not None:
            raise AcceleratorError(reason)

    def why_unusable(self) -> str | None:
        """Why nothing can run on it any more, with the remedy, or None."""
        if self._closed:
            return "the accelerator is closed"
        if os.getpid() != self._pid:
            return (
                "the accelerator's threads do not exist in a forked process: compile the model again there "
                "(torch._dynamo.reset() first)"
            )
        dead = next((stream for stream in self._streams.values() if stream.ended), None)
        if dead is not None:
            return (
                f"the accelerator's thread {dead.thread.name} has died: compile the model again "
                "(torch._dynamo.reset() first)"
            )
        return None

    # ---- work ----------------------------------------------------------------------------------------
    def submit(self, lane: int, task: Task, *, carried: bool = False) -> None:
        """Enqueue a task on a stream; ``carried``: the end of the step does not wait for it."""
        if lane == UP and not carried and task.done is not None:
            self._last_upload = task.done
        if not self._streams:
            self._start()
        if self._host_delays is not None:
            self._host_delays.sleep()
        if task.work is not None:
            self._shared.pacer.charge(HOST, time.perf_counter(), task.op.issue_s)
        self._streams[lane].submit(task)

    def reseed(self, seed: int | None) -> None:
        """Other random delays from here on (None: none); all streams have to be idle."""
        self._shared.seed = seed
        self._host_delays = None if seed is None else Delays(seed, HOST)
        for lane, stream in self._streams.items():
            stream.delays = None if seed is None else Delays(seed, lane)

    def marker(self, lane: int, op: Op) -> threading.Event:
        """An event that is set once everything issued to a stream so far is over."""
        done = threading.Event()
        self.submit(lane, Task(op, done=done))
        return done

    def account(self, op: Op, lane: int, start_s: float) -> None:
        """Pace and trace an operation of the host thread."""
        self._shared.account(op, lane, start_s)

    def pace(self, op: Op, lane: int, start_s: float) -> None:
        """Pace an operation of the host thread that only waits."""
        self._shared.pacer.charge(lane, start_s, op.seconds)

    def trace(self, enabled: bool) -> list[Span]:
        """Switch tracing; the spans so far."""
        self._shared.tracing = enabled
        spans, self._shared.spans = self._shared.spans, []
        return spans

    # ---- steps ---------------------------------------------------------------------------------------
    def drain(self) -> None:
        """Block until every stream is idle."""
        for event in [self.marker(lane, Op("synchronize")) for lane in self._streams]:
            event.wait()

    def drain_step(self) -> None:
        """Block until everything is over but what was submitted as carried."""
        for event in [self._last_upload, *(self.marker(lane, Op("end_step")) for lane in (COMPUTE, DOWN, PIN, WORKER))]:
            event.wait()

    def abort(self) -> None:
        """Pass over what is still queued, forget the failure, leave the step."""
        self._shared.aborting = True
        self.drain()
        self._shared.failure = None
        self._shared.aborting = False
        self.leave_step()

    def enter_step(self) -> None:
        """Hand the interpreter over quickly from here on."""
        self.in_step = True
        self._switching.enter()

    def leave_step(self) -> None:
        """Give the interpreter its own switch interval back."""
        self.in_step = False
        self._switching.leave()

    def take_failure(self) -> BaseException | None:
        """What to raise for what a stream's work raised since the last abort; aborts the step if there is any."""
        failure = self._shared.failure
        if failure is None:
            return None
        self.check_usable()
        self.abort()
        node, cause = failure
        if isinstance(cause, HostFailure):
            return cause.error
        if isinstance(cause, (ScheduleError, AcceleratorMemoryError)):
            return cause
        error = AcceleratorError(f"{node} failed on the accelerator: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        return error

    def rest(self) -> None:
        """End the threads, which pass over what is still queued; the next task starts others.

        One of them may call this (it let go of a model's last tensor): it ends later, and what it shares is its own.
        """
        self._stop()
        self._streams = {}
        self._shared = replace(self._shared, failure=None, aborting=False)
        self.leave_step()

    def close(self) -> bool:
        """Stop the threads; False if it was closed already."""
        if self._closed:
            return False
        self._closed = True
        self._stop()
        self.leave_step()
        return True


def _stop_streams(shared: Shared, streams: list[Stream]) -> None:
    """Skip what is queued and end the threads; also runs at interpreter exit, before daemons are killed."""
    shared.aborting = True
    for stream in streams:
        stream.stop()
    end_s = time.monotonic() + LONGEST_JOIN_S
    for stream in streams:
        if stream.thread is not threading.current_thread():
            stream.thread.join(timeout=max(0.0, end_s - time.monotonic()))
