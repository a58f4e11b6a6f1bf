"""A model larger than the memory that its process may still allocate streams from its safetensors mapping."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.host_memory.limited_child import ALLOWED_BYTES, LAYERS, WIDTH

STEPS = 3


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the limited process tells of its run."""
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i in range(LAYERS):
        tensors[f"layers.{i}.weight"] = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        tensors[f"layers.{i}.bias"] = torch.randn(WIDTH, generator=generator)
    save_file(tensors, file)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.host_memory.limited_child", str(file)]
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_the_limit_holds_and_the_model_exceeds_it(report: Any) -> None:
    assert report["weight_bytes"] > 1.5 * ALLOWED_BYTES
    assert report["allocation_fails"], "the process could have copied its weights"


def test_the_result_is_eagers(report: Any) -> None:
    assert report["difference"] <= 1e-4 * max(1.0, report["norm"])


def test_its_weights_went_through_the_ring_from_the_file(report: Any) -> None:
    assert report["mapped"]
    assert report["host_bytes"] > 0
    assert report["streamed_bytes"] > report["weight_bytes"] // 2
    assert report["staged_bytes"] == STEPS * report["streamed_bytes"]
    assert "lies in a private file mapping" in report["explain"]
    assert "RLIMIT_DATA" in report["explain"]


def test_no_copy_of_the_weights_was_made(report: Any) -> None:
    assert report["anonymous_bytes"] < ALLOWED_BYTES
