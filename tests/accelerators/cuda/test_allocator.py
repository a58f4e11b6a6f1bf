"""What torch's allocator reserves beside what a plan counts, against a fake of torch.cuda."""

from __future__ import annotations

import pytest
import torch

from hetegen_compile.accelerators import CudaAccelerator
from tests.accelerators import fake_cuda


def test_what_is_reserved_beyond_the_budget_is_given_back_between_steps(
    cuda: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches that grow leave memory that nothing longer fits; giving it back waits for the device, so not in vain."""
    most = 1000 + sum(cuda.overhead_bytes().values())
    left = most + 800  # as much is in use
    monkeypatch.setitem(fake_cuda.RESERVED, "current", 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: fake_cuda.RESERVED.update(current=left))
    cuda.limit_memory(1000)
    found = []
    for reserved in (most, most + 900, most + 901, left * 9 // 8 + 1, most, most + 900):
        fake_cuda.RESERVED["current"] = reserved
        cuda.begin_step()
        found.append(fake_cuda.RESERVED["current"])
        fake_cuda.RESERVED["current"] = reserved
        cuda.end_step()
    before_each = [most, most + 900, left, left * 9 // 8 + 1, left, most + 900]
    assert found == before_each
