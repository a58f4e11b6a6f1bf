"""Stages of ``benchmarks.gpu`` that measure a model once more, another way: what they ask for, and beside what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.children import Notebook
from benchmarks.compare import __main__ as comparison
from benchmarks.compare.job import HETEGEN, Job, Row
from benchmarks.gpu import speed
from benchmarks.gpu.settings import Settings, SkipError
from benchmarks.random_models import weight_bytes_of
from hetegen_compile.cost_model import HardwareProfile, load_profile, profile_to_json

STEPS = ({"gated": False, "gaps_s": 0.5}, {"gated": True, "gaps_s": 0.02}, {"gated": True, "gaps_s": 0.01})
SMALL, LARGE = (int(float(share) * weight_bytes_of("opt-6.7b", torch.bfloat16)) for share in speed.LIMITS)


@dataclass
class Run:
    """A run of the suite in a folder: three tokens a second wherever a child is asked."""

    folder: Path
    jobs: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settings = Settings("cuda", str(self.folder), "h100-server", minutes=1.0, dtype="bfloat16", seconds=240.0)
        self.notebook = Notebook(self.folder / "notes.json")

    def child(self, job: Job, limit_s: float, files: Path) -> list[Row]:
        """Stands for ``compare.run``."""
        del limit_s, files
        self.jobs.append(job)
        return [Row(job.way, job.gpu_memory, decode_tokens_per_s=3.0, steps=STEPS)]

    def calibrated(self, profile: HardwareProfile, earlier: Sequence[Row]) -> None:
        """What the stages before have left."""
        self.settings.profile_path.write_text(json.dumps(profile_to_json(profile)))
        rows = [asdict(row) for row in earlier]
        (self.folder / "opt-6.7b.json").write_text(json.dumps({"rows": rows}))

    @property
    def rates(self) -> list[dict[str, Any]]:
        """Tokens a second, here and in the earlier stage."""
        told = self.notebook.entries["summary"]
        return [{name: one[name].get("decode_tokens_per_s") for name in one} for one in told]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    made = Run(tmp_path)
    monkeypatch.setattr(comparison, "run", made.child)
    monkeypatch.setattr(comparison, "heading", lambda arguments: {"cache": arguments.cache})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return made


@pytest.mark.parametrize("stage", [speed.reading_ahead, speed.growing_cache])
def test_without_a_calibration_of_this_run_nothing_is_measured(stage: Any, run: Run) -> None:
    with pytest.raises(SkipError, match="calibrated nothing"):
        stage(run.settings, run.notebook)
    assert not run.jobs


@pytest.mark.parametrize(("calibrated_bytes", "here_bytes"), [(1 << 20, 0), (0, 16 << 20)])
def test_reading_ahead_is_compared_with_not_doing_it(calibrated_bytes: int, here_bytes: int, run: Run) -> None:
    profile = load_profile("h200-server")
    calibrated = replace(profile, host=replace(profile.host, ahead_bytes=calibrated_bytes))
    run.calibrated(calibrated, [Row(HETEGEN, SMALL, decode_tokens_per_s=2.0), Row(HETEGEN, 2 * SMALL)])
    speed.reading_ahead(run.settings, run.notebook)
    (job,) = run.jobs
    assert (load_profile(job.hardware).host.ahead_bytes, job.others_s, job.cache) == (here_bytes, 0.0, "static")
    assert run.notebook.entries["ahead_bytes"] == {"calibrated": calibrated_bytes, "here": here_bytes}
    assert run.rates == [{"here": 3.0, "earlier": 2.0}]
    assert run.notebook.entries["summary"][0]["here"]["steps"]["gaps_s"] == 0.02


def test_the_cache_that_generate_makes_by_itself_is_measured_beside_the_static_one(run: Run) -> None:
    earlier = [Row(HETEGEN, limit, decode_tokens_per_s=4.0) for limit in (SMALL, LARGE)]
    run.calibrated(load_profile("h200-server"), earlier)
    speed.growing_cache(run.settings, run.notebook)
    asked = [(job.way, job.cache, job.hardware, job.gpu_memory) for job in run.jobs]
    assert asked == [(HETEGEN, "dynamic", run.settings.measured_hardware, limit) for limit in (SMALL, LARGE)]
    assert all(job.prompt < 128 < job.prompt + job.new_tokens for job in run.jobs), "where blocks become larger"
    assert run.notebook.entries["what"] == {"cache": "dynamic"}
    assert run.rates == [{"here": 3.0, "earlier": 4.0}] * 2
    assert [row["gpu_memory"] for row in run.notebook.entries["rows"]] == [SMALL, LARGE]
