"""The thread that computes host parts."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch

from hetegen_compile.accelerators import openmp
from hetegen_compile.accelerators.cuda.worker import Worker
from hetegen_compile.accelerators.promises import Promise, kept_in


@pytest.mark.parametrize(("threads", "worker"), [(1, 1), (2, 2), (3, 2), (7, 6), (8, 6), (16, 14)])
def test_the_worker_leaves_processors_to_the_issuing_thread_and_others(threads: int, worker: int) -> None:
    found: list[int] = []
    thread = Worker(lambda: None)
    torch.set_num_threads(threads)
    thread.begin()
    thread.submit(lambda: found.append(torch.get_num_threads()))
    thread.drain()
    assert (found, torch.get_num_threads()) == ([worker], threads)
    thread.close()


@pytest.mark.skipif(openmp._pause_function() is None, reason="another OpenMP library")
@pytest.mark.parametrize(("threads", "left"), [(2, 2), (4, 1)])
def test_the_issuing_threads_own_threads_end_where_the_worker_has_as_many(threads: int, left: int) -> None:
    def own_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir())) - before

    x, thread = torch.ones(1 << 17), Worker(lambda: None)
    torch.set_num_threads(threads)
    openmp.end_own_threads()
    thread.begin()
    thread.drain()
    before = len(list(Path("/proc/self/task").iterdir())) - 1
    for _ in range(2):
        x.add_(1)  # as what generates does with a step's result
        assert own_threads() == threads
        thread.begin()
        assert own_threads() == threads, "the worker is given something to do first"
        thread.make_room()
        assert own_threads() == left
        x.add_(1)
        thread.make_room()
        assert own_threads() == threads, "once a step"
        openmp.end_own_threads()
    thread.close()


def test_a_worker_that_was_ended_is_started_again() -> None:
    found: list[int] = []
    thread = Worker(lambda: None)
    torch.set_num_threads(3)
    for _ in range(2):
        thread.begin()
        thread.submit(lambda: found.append(torch.get_num_threads()))
        thread.drain()
        thread.close()
    assert found == [2, 2]


def test_a_worker_may_end_itself() -> None:
    thread = Worker(lambda: None)
    thread.begin()
    first = thread._thread._thread
    assert first is not None
    thread.submit(thread.close)
    first.join(10)
    assert not first.is_alive()
    found: list[str] = []
    thread.begin()
    thread.submit(lambda: found.append(threading.current_thread().name))
    thread.drain()
    assert found == ["hetegen-worker"]
    thread.close()


def test_a_worker_ends_when_its_owner_is_gone() -> None:
    owner = Worker(lambda: None)
    owner.begin()
    thread = owner._thread._thread
    assert thread is not None
    del owner
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_promises_in_an_argument() -> None:
    promise = Promise("p")
    promise.keep([1, 2])
    given = ([promise[1]], {"a": promise}, slice(1, promise[1]), 3)
    assert kept_in(given) == ([2], {"a": [1, 2]}, slice(1, 2), 3)
