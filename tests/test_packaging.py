"""What users install: one top-level package of real files, and a backend that torch finds by name."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import pytest

from hetegen_compile import pipeline

pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml asks for it; there is no isolation")

ROOT = Path(__file__).parents[1]
PACKAGE = "hetegen_compile"
LINKED = ("passes", "cost_model")
BUILD = "import sys; from setuptools import build_meta as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"


def copy_of_the_project(folder: Path) -> Path:
    """The working tree as it is, links included, where building leaves no traces in it."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    return Path(shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored))


def build(project: Path, kind: str, into: Path) -> Path:
    """Build without network or isolation, by the interpreter and the setuptools of these tests."""
    into.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(into)],
        cwd=project, env=environment, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    return build(copy_of_the_project(folder / "project"), "sdist", folder / "out")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build(copy_of_the_project(folder / "project"), "wheel", folder / "out")


def sources() -> set[str]:
    """Files of the package in the working tree, through its links, as paths from the root."""
    found: set[str] = set()
    for folder, names, files in os.walk(ROOT / PACKAGE, followlinks=True):
        names[:] = [name for name in names if name != "__pycache__"]
        found |= {(Path(folder) / file).relative_to(ROOT).as_posix() for file in files}
    return found


def in_package(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.startswith(f"{PACKAGE}/") and not name.endswith("/")}


def test_the_links_are_relative() -> None:
    for name in LINKED:
        link = ROOT / PACKAGE / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"
        assert (ROOT / name / "__init__.py").is_file()


def test_wheel_is_one_package_of_real_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert not any(entry.external_attr >> 16 & 0o170000 == 0o120000 for entry in archive.infolist())
        for name in LINKED:
            held = archive.read(f"{PACKAGE}/{name}/__init__.py")
            assert held == (ROOT / name / "__init__.py").read_bytes()
    tops = {PurePosixPath(name).parts[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {PACKAGE}
    assert in_package(names) == sources()
    assert f"{PACKAGE}/py.typed" in names
    assert any(name.startswith(f"{PACKAGE}/cost_model/presets/") for name in names)


def test_sdist_is_one_package_of_real_files(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {PurePosixPath(*PurePosixPath(member.name).parts[1:]) for member in members}
    folders = {name.parts[0] for name in names if len(name.parts) > 1}
    assert {folder for folder in folders if not folder.endswith(".egg-info")} == {PACKAGE}
    assert in_package(str(name) for name in names if name.suffix or name.name == "py.typed") == sources()


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (project,) = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(build(project, "wheel", tmp_path / "out")) as again, zipfile.ZipFile(wheel) as first:
        assert in_package(again.namelist()) == in_package(first.namelist())


def test_the_backend_is_registered_by_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(name).decode())
    assert dict(entry_points["torch_dynamo_backends"]) == {"hetegen": f"{PACKAGE}.backend:hetegen"}


def test_an_installed_wheel_ignores_a_folder_named_passes(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "__init__.py").write_text("raise AssertionError('the wrong passes')")
    code = (
        "import torch\n"
        "assert 'hetegen' in torch._dynamo.list_backends()\n"
        "import hetegen_compile.passes, hetegen_compile.cost_model\n"
        "print(hetegen_compile.passes.__file__)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=120,
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.stdout.strip() == str(tmp_path / "site" / PACKAGE / "passes" / "__init__.py")


def test_the_readme_names_every_stage() -> None:
    text = (ROOT / "README.md").read_text()
    for stage in pipeline.PIPELINE:
        assert f"| `{stage.name}` | {stage.kind} |" in text
