"""Fixtures of the accelerators' tests."""

from collections.abc import Iterator

import pytest
import torch

from hetegen_compile.accelerators import EmulatedAccelerator


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The machine is shared: one thread for eager arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def accelerator() -> Iterator[EmulatedAccelerator]:
    """An emulated accelerator with random delays, closed afterwards."""
    accelerator = EmulatedAccelerator(1 << 28, seed=0)
    yield accelerator
    accelerator.close()
