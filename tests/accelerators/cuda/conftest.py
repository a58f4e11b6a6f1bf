"""What tests of the CUDA accelerator without a GPU need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hetegen_compile.accelerators import CudaAccelerator
from tests.accelerators import fake_cuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaAccelerator]:
    """CUDA over the fake, closed afterwards."""
    fake_cuda.install(monkeypatch)
    opened = CudaAccelerator()
    yield opened
    opened.close()
