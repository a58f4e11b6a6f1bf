"""The sweep over architectures: what it writes down about a process that ran out of time."""

from __future__ import annotations

from benchmarks.architectures import _places

DUMP = """Timeout (0:02:00)!
Thread 0x00007f00 (most recent call first):
  File "/home/someone/venv/lib/python3.11/site-packages/torch/nn/init.py", line 83 in _no_grad_normal_
  File "/home/someone/hetegen/benchmarks/architectures.py", line 70 in main
"""


def test_places_name_no_folder_of_the_machine() -> None:
    assert _places(DUMP) == ["torch/nn/init.py:83 _no_grad_normal_", "hetegen/benchmarks/architectures.py:70 main"]
