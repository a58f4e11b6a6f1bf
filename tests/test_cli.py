"""The command line: what is printed where, what is kept, and exit codes."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler
from transformers import OPTConfig

from hetegen_compile import calibration, cli, doctor
from hetegen_compile.calibration import Effort, calibrate
from hetegen_compile.cost_model import HardwareProfile, load_profile, preset_names, profile_from_json
from hetegen_compile.doctor import Check, package
from hetegen_compile.dry_run.models import DTYPES
from hetegen_compile.errors import AcceleratorUnavailableError
from hetegen_compile.registration import ENTRY_POINT
from tests.calibration.tiny import TINY


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tiny measurements without a GPU, and a cache folder of the test's own."""

    def tiny(effort: Effort = TINY) -> HardwareProfile:
        return calibrate(progress=False, effort=effort)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(calibration, "calibrate", tiny)


def kept(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob("hetegen/profiles/*.json"))


def test_calibrate_prints_a_table_and_keeps_the_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate"]) == 0
    (path,) = kept(tmp_path)
    printed = capsys.readouterr()
    assert "host Linear, 1 token(s), GB/s" in printed.out
    assert str(path) in printed.err


def test_json_is_the_profile_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", "--json"]) == 0
    profile = profile_from_json(json.loads(capsys.readouterr().out), "stdout")
    assert kept(tmp_path)[0].stem in profile.name


def test_no_cache_keeps_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", "--no-cache"]) == 0
    assert kept(tmp_path) == []
    assert "not kept" in capsys.readouterr().err


def test_our_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> HardwareProfile:
        raise AcceleratorUnavailableError("no such thing")

    monkeypatch.setattr(calibration, "calibrate", fail)
    assert cli.main(["calibrate"]) == 1
    assert capsys.readouterr().err == "hetegen: no such thing\n"


@pytest.mark.parametrize("argv", [[], ["plan"], ["calibrate", "--fast"]])
def test_wrong_arguments_exit_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2


@pytest.mark.parametrize(("statuses", "code"), [(["ok", "warn"], 0), (["ok", "problem", "ok"], 1)])
def test_only_a_problem_changes_the_exit_code(
    statuses: list[doctor.Status],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checks = [Check(status, f"subject {index}", "found", "do this") for index, status in enumerate(statuses)]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    assert cli.main(["doctor"]) == code
    printed = capsys.readouterr().out
    assert all(check.subject in printed for check in checks)
    assert "do this" in printed


def found(checks: Iterable[Check], subject: str) -> Check:
    (check,) = [check for check in checks if check.subject == subject]
    return check


def test_whatever_is_not_ok_has_a_remedy() -> None:
    checks = doctor.examine()
    assert [check.subject for check in checks if check.status != "ok" and not check.remedy] == []
    assert found(checks, "torch").finding == importlib.metadata.version("torch")


@pytest.mark.parametrize(("nodes", "status"), [((), "ok"), ((0,), "ok"), ((0, 1), "warn")])
def test_several_memory_nodes_are_told(nodes: tuple[int, ...], status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "numa_nodes", lambda cpus: nodes)
    check = found(doctor.examine(), "memory nodes")
    assert check.status == status
    assert ("numactl --interleave=all" in (check.remedy or "")) is (status == "warn")


def test_no_gpu_says_what_the_emulated_accelerator_is() -> None:
    check = found(doctor.examine(), "GPU")
    assert check.status == "warn"
    assert "says nothing about speed" in check.finding


def test_versions() -> None:
    assert package("torch", (2, 11), untested=(999,)).status == "ok"
    assert package("torch", (999,), untested=(1000,)).status == "problem"
    assert package("torch", (2,), untested=(2, 1)).status == "warn"
    missing = package("no-such-distribution-of-ours", (1,), untested=(2,))
    assert (missing.status, missing.finding) == ("problem", "not installed")


@pytest.mark.parametrize(
    ("values", "status"),
    [([], "warn"), ([ENTRY_POINT], "ok"), (["elsewhere:hetegen"], "problem")],
)
def test_the_entry_point(values: list[str], status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group = "torch_dynamo_backends"
    points = [importlib.metadata.EntryPoint("hetegen", value, group) for value in values]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group, name: points)
    assert doctor._backend().status == status


def test_without_a_compiler_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(doctor, "get_cpp_compiler", none)
    assert doctor._compiler().status == "problem"


def test_the_measured_profile_is_found_once_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._profile().finding.startswith("none")
    cli.main(["calibrate"])
    path = str(kept(tmp_path)[0])
    monkeypatch.setattr(doctor, "seems_disturbed", lambda profile: "")
    assert doctor._profile() == Check("ok", "measured profile", path)
    monkeypatch.setattr(doctor, "seems_disturbed", lambda profile: "one size says so, another does not")
    told = doctor._profile()
    assert (told.status, told.remedy) == ("warn", "hetegen calibrate again when nothing else runs")
    assert (
        told.finding
        == f"{path}; probably measured while other programs were running: one size says so, another does not"
    )


@pytest.mark.parametrize(
    ("gate_s", "why", "told"),
    [
        (4e-6, "", "issued ahead of the host's parts (a gate costs 4.0 us)"),
        (0.0, "no driver", "nothing is issued ahead of the host's parts: no driver"),
        (0.0, "", "nothing is issued ahead of the host's parts: it was no faster, or not measured"),
    ],
)
def test_with_a_gpu_the_profile_says_whether_steps_are_issued_ahead(
    monkeypatch: pytest.MonkeyPatch, gate_s: float, why: str, told: str
) -> None:
    profile = load_profile("h100-server")
    profile = replace(profile, accelerator=replace(profile.accelerator, gate_s=gate_s))
    monkeypatch.setattr(doctor, "why_no_gates", lambda: why)
    assert doctor._issuing(profile).endswith(told)


def test_a_gpu_without_a_profile_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    check = doctor._profile()
    assert check.status == "warn"
    assert "hetegen calibrate" in check.remedy


def test_more_threads_than_cores_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "usable_cpus", lambda: {0})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert doctor._processor().status == "warn"


def test_a_memory_limit_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory_limit_bytes", lambda: 1 << 30)
    check = doctor._memory()
    assert check.status == "warn"
    assert "1.00 GiB" in check.finding


# ---- hetegen plan -------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with the config of a small OPT."""
    config = OPTConfig(
        hidden_size=1024, ffn_dim=4096, num_hidden_layers=2, num_attention_heads=16, vocab_size=1024,
        word_embed_proj_dim=1024,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "opt")
    return str(tmp_path / "opt")


PLAN = ["--hardware", "a10-xeon", "--gpu-memory", "24MiB", "--prompt", "32", "--new-tokens", "4"]


def test_plan_prints_speed_memory_and_what_splitting_buys(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", model, *PLAN, "--table"]) == 0
    printed = capsys.readouterr()
    assert "float16, on a10-xeon: 32 tokens in, 4 out. Predicted, nothing was run." in printed.out
    for expected in (
        "decode step, 34 tokens in the cache", "tokens/s, prefill included", "24.00 MiB budget", "- resident weights",
        "- weights and buffers", "module by module, no prefetch", "CPU only", "splitting ",
        "prefill: hetegen dry run, hardware a10-xeon, 17 to 64 tokens", "model.decoder.layers.{0..1}",
        "decode, at the longest context: hetegen dry run, hardware a10-xeon, 1 token",
    ):  # fmt: skip
        assert expected in printed.out
    assert "tracing the forward of 32 tokens" in printed.err


def test_plan_as_json_is_json_and_nothing_else(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", model, *PLAN, "--split", "0.5", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["budget_bytes"] == 24 * 2**20
    shares = {row["host_share"] for row in data["decode"]["rows"] if row["placement"] == "split"}
    assert shares == {0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "no/such-model"], "the network is not used"),
        (["plan", "MODEL", "--hardware", "nothing"], "nothing"),
        (["plan", "/nowhere/config.json"], "no config of '/nowhere/config.json': there is no such file or folder"),
        (["plan", "MODEL", "--dtype", "int4"], "dtype='int4'"),
        (["plan", "MODEL", "--gpu-memory", "6 bananas"], "is not a size"),
        (["plan", "MODEL", "--hardware", "a10-xeon", "--gpu-memory", "10KiB", "--new-tokens", "1"], "smallest budget"),
    ],
)
def test_plan_errors_are_one_line(
    arguments: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([model if argument == "MODEL" else argument for argument in arguments]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("hetegen: ")
    assert message in line


def test_plan_knows_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "m", "--split", "half"])
    assert "argument --split: 'half' is neither auto nor a number from 0 to 1" in capsys.readouterr().err


def test_plan_help_names_presets_and_types(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for expected in (*preset_names(), *DTYPES, "(default: the config's where it states one of these, else float16)"):
        assert expected in printed
