"""A plan for the paper's machine against what the paper measured there (``benchmarks.paper_figure`` has all points)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from hetegen_compile.dry_run import plan_generation

FILE = Path(__file__).parents[2] / "benchmarks" / "paper_opt_6_7b.json"


def test_tokens_per_second_at_8_gb_are_the_papers() -> None:
    series: dict[str, Any] = json.loads(FILE.read_text())
    measured = {system: dict(map(tuple, points)) for system, points in series["series"].items()}
    plan = plan_generation(
        AutoConfig.for_model(**series["config"]), prompt=series["prompt"], new_tokens=series["new_tokens"],
        options={"hardware": "a10-xeon", "gpu_memory": int(8e9)},
    )  # fmt: skip
    each, streamed = plan.baselines["per_linear"], plan.baselines["streamed"]
    assert each is not None
    assert streamed is not None
    assert each.tokens_per_s == pytest.approx(measured["HeteGen"][8.0], rel=0.12)
    assert streamed.tokens_per_s == pytest.approx(measured["FlexGen"][8.0], rel=0.2)
    assert plan.tokens_per_s > 0.97 * each.tokens_per_s
    assert plan.decode is not None
    assert plan.decode.host_bytes > 0
    assert plan.decode.streamed_bytes > 0
    assert plan.accelerator_peak_bytes <= 8e9
