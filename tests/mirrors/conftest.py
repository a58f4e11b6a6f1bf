"""What all tests of mirrors need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hetegen_compile.accelerators import EmulatedAccelerator
from tests.mirrors.steps import Steps


@pytest.fixture
def accelerator() -> Iterator[EmulatedAccelerator]:
    opened = EmulatedAccelerator(1 << 24)
    yield opened
    opened.close()


@pytest.fixture
def steps(accelerator: EmulatedAccelerator) -> Steps:
    return Steps(accelerator)
