"""The audit passes here, and each thing that it is for makes it fail with the name and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.audit import CONSTRAINTS, Installed, audit, cuda_runtime, installed, main, read_pins

PINS = {"requests": "2.34.2", "torch": "2.13.0", "typing-extensions": "4.16.0"}


def requests(**changes: object) -> Installed:
    fields: dict[str, object] = {"name": "requests", "version": "2.34.2", "expression": "Apache-2.0", **changes}
    return Installed(**fields)  # type: ignore[arg-type]


def test_the_constraints_pin_everything_exactly() -> None:
    pins = read_pins(CONSTRAINTS.read_text())
    assert pins["torch"] == "2.13.0"
    assert len(pins) > 40


def test_an_environment_of_pinned_distributions_passes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pins = {one.name: one.version.partition("+")[0] for one in installed() if one.name != "hetegen"}
    path = tmp_path / "constraints.txt"
    path.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
    code = main([str(path)])
    told = capsys.readouterr()
    assert "not in constraints.txt" not in told.err
    assert "pinned to" not in told.err
    assert code == (1 if told.err else 0)


def test_what_is_installed_and_not_pinned_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("# nothing is known\n")
    assert main([str(path)]) == 1
    told = capsys.readouterr().err
    assert "audit: torch " in told
    assert "pip" not in [line.split()[1] for line in told.splitlines()]


def test_what_is_as_pinned_is_no_problem() -> None:
    found = [
        requests(),
        Installed("torch", "2.13.0+cpu", "Apache-2.0 WITH LLVM-exception AND (BSD-3-Clause OR MIT)"),
        Installed("typing_extensions", "4.16.0", classifiers=("Python Software Foundation License",)),
        Installed("pip", "23.2.1", licence="MIT"),
        Installed("hetegen", "0.1.0"),
        Installed("hetegen", "0.1.0"),  # its egg-info in the folder where the audit is started
    ]
    assert audit(found, PINS) == []


@pytest.mark.parametrize(
    ("one", "told"),
    [
        (requests(name="reqeusts"), "close to 'requests'"),
        (requests(name="unheard-of"), "uninstall it"),
        (requests(version="2.34.3"), "pinned to 2.34.2"),
        (requests(version="2.34.20"), "pinned to 2.34.2"),
        (requests(expression="GPL-3.0-only"), "licence (GPL-3.0-only)"),
        (requests(expression="MIT AND GPL-3.0-only"), "licence (MIT AND GPL-3.0-only)"),
        (requests(expression=None), "licence (none)"),
        (requests(expression=None, licence="as you like, no warranty"), "licence (as you like"),
        (requests(expression=None, classifiers=("MIT License", "Other/Proprietary License")), "licence (MIT License, "),
        (requests(name="nvidia-cublas", expression="MIT"), "nvidia-cublas 2.34.2 is not in constraints.txt"),
    ],
)
def test_a_problem_is_one_line_with_its_remedy(one: Installed, told: str) -> None:
    (problem,) = audit([one], PINS)
    assert problem.startswith(f"{one.name} {one.version}")
    assert told in problem


def test_one_name_twice_is_a_problem() -> None:
    assert any("installed twice" in problem for problem in audit([requests(), requests()], PINS))


def test_the_cuda_runtime_is_what_torch_requires_and_nothing_else() -> None:
    found = [
        Installed("torch", "2.13.0", "MIT", requires=('cuda-toolkit[cublas]==13.*; os_name == "posix"', "sympy")),
        Installed("cuda-toolkit", "13.0.2", requires=('nvidia-cublas==13.0.*; extra == "cublas"',)),
        Installed("nvidia-cublas", "13.0.1", licence="NVIDIA Proprietary Software"),
        Installed("nvidia-cubias", "13.0.1", "MIT"),
    ]
    assert cuda_runtime(found) == {"cuda-toolkit", "nvidia-cublas"}
    (problem,) = audit(found, PINS)
    assert problem.startswith("nvidia-cubias")


@pytest.mark.parametrize("line", ["torch", "torch>=2", "torch==2.*", "torch==", "-r other.txt", "torch==2.1; x == 'y'"])
def test_a_line_that_pins_nothing_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="pins no version"):
        read_pins(f"# comment\n{line}\n")


def test_a_name_pinned_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        read_pins("a-b==1\nA_b==2\n")
