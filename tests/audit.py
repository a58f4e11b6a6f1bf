"""Audit of what is installed: known names, exactly the pinned versions, licences that may be used.

    python -m tests.audit [constraints.txt]

Every distribution that this interpreter sees must be one that ``constraints.txt`` names, at that version, under a
licence of the list below. Exempt are the project itself, the installer (pip, wheel: their versions come with the
interpreter), and the CUDA runtime that a torch with CUDA requires and pins itself. Reads installed metadata only:
nothing is imported from the audited distributions, nothing is fetched.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
PROJECT = "hetegen"
INSTALLERS = frozenset({"pip", "wheel"})
CUDA_PREFIXES = ("nvidia-", "cuda-", "triton")
"""Names of the CUDA runtime's parts, accepted only where torch requires them."""

LICENCES = frozenset({
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "CNRI-Python", "ISC", "MIT", "MPL-2.0", "PSF-2.0", "Unlicense", "Zlib",
})  # fmt: skip
"""SPDX identifiers of the licences that may be used; in an expression each of them has to be here."""

CLASSIFIERS = frozenset({
    "Apache Software License", "BSD License", "ISC License (ISCL)", "MIT License",
    "Mozilla Public License 2.0 (MPL 2.0)", "Python Software Foundation License",
})  # fmt: skip
"""Their names in trove classifiers, for metadata from before SPDX expressions."""

SPELLINGS = frozenset({"apache", "apache 2.0", "apache 2.0 license", "bsd"})
"""Other ways in which the free text of ``License`` says one of them."""

_PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)")


@dataclass(frozen=True)
class Installed:
    """What the audit knows of one installed distribution; ``licence`` as its metadata states it, in any form."""

    name: str
    version: str
    expression: str | None = None
    licence: str | None = None
    classifiers: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()


def canonical(name: str) -> str:
    """A distribution's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(text: str) -> dict[str, str]:
    """Version by canonical name from a constraints file.

    Raises ValueError for a line that pins nothing exactly and for a name that occurs twice.
    """
    pins: dict[str, str] = {}
    for line in (line.partition("#")[0].strip() for line in text.splitlines()):
        if not line:
            continue
        match = _PIN.fullmatch(line)
        if match is None:
            raise ValueError(f"{line!r} pins no version: write name==version")
        if canonical(match["name"]) in pins:
            raise ValueError(f"{match['name']} is pinned twice: remove one line")
        pins[canonical(match["name"])] = match["version"]
    return pins


def installed() -> list[Installed]:
    """Every distribution on this interpreter's path."""
    return [_described(distribution) for distribution in metadata.distributions()]


def _described(distribution: metadata.Distribution) -> Installed:
    notes = distribution.metadata
    prefix = "License :: "
    return Installed(
        name=str(notes["Name"]),
        version=str(notes["Version"]),
        expression=notes.get("License-Expression"),  # type: ignore[attr-defined]
        licence=notes.get("License"),  # type: ignore[attr-defined]
        classifiers=tuple(c.rpartition(" :: ")[2] for c in notes.get_all("Classifier") or () if c.startswith(prefix)),
        requires=tuple(distribution.requires or ()),
    )


def audit(found: Sequence[Installed], pins: Mapping[str, str]) -> list[str]:
    """What is wrong, a line each with the remedy; empty if nothing is."""
    runtime = cuda_runtime(found)
    problems = list(_twice(found))
    for one in found:
        name = canonical(one.name)
        if name == PROJECT or name in runtime:
            continue
        if name not in INSTALLERS:
            problems += _version_problems(one, pins)
        if not licence_is_allowed(one):
            stated = one.expression or one.licence or ", ".join(one.classifiers) or "none"
            problems.append(
                f"{one.name} {one.version}: its licence ({stated[:80]}) is not on the list of tests/audit.py: read it, "
                "then add it there or do without the package"
            )
    return problems


def _twice(found: Iterable[Installed]) -> Iterator[str]:
    names = [canonical(one.name) for one in found if canonical(one.name) != PROJECT]  # seen in its own folder, too
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{name} is installed twice: make the environment anew (make clean)"


def _version_problems(one: Installed, pins: Mapping[str, str]) -> Iterator[str]:
    pinned = pins.get(canonical(one.name))
    if pinned is None:
        near = difflib.get_close_matches(canonical(one.name), pins, n=1, cutoff=0.8)
        hint = f" (its name is close to {near[0]!r}: is it the one that was meant?)" if near else ""
        yield (
            f"{one.name} {one.version} is not in constraints.txt{hint}: uninstall it, or find out what needs it and "
            f"add '{one.name}=={one.version}'"
        )
    elif one.version != pinned and one.version.partition("+")[0] != pinned:  # +cpu and the like are builds of it
        yield (
            f"{one.name} {one.version} is installed and pinned to {pinned}: make the environment anew (make clean) "
            "or change the pin"
        )


def cuda_runtime(found: Iterable[Installed]) -> frozenset[str]:
    """Canonical names of the CUDA runtime's parts that torch requires, directly or through one another."""
    requires = {canonical(one.name): [_required(text) for text in one.requires] for one in found}
    reached: set[str] = set()
    pending = ["torch"]
    while pending:
        for name in requires.get(pending.pop(), []):
            if name.startswith(CUDA_PREFIXES) and name not in reached:
                reached.add(name)
                pending.append(name)
    return frozenset(reached)


def _required(requirement: str) -> str:
    """The canonical name in a requirement such as ``nvidia-cublas[x]==13.*; platform_system == "Linux"``."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return canonical(match[0]) if match else ""


def licence_is_allowed(one: Installed) -> bool:
    """Whether every licence that the metadata names may be used: the expression, else classifiers, else free text."""
    if one.expression:
        return _is_allowed_expression(one.expression)
    if one.classifiers:
        return all(classifier in CLASSIFIERS for classifier in one.classifiers)
    text = (one.licence or "").strip()
    return text.lower() in SPELLINGS or _is_allowed_expression(text)


def _is_allowed_expression(expression: str) -> bool:
    terms = [term.strip() for term in re.split(r"\bAND\b|\bOR\b|[()]", expression)]
    return any(terms) and all(term in LICENCES for term in terms if term)


def main(arguments: Sequence[str]) -> int:
    """Print what is wrong; 1 if something is."""
    pins = read_pins(Path(arguments[0] if arguments else CONSTRAINTS).read_text(encoding="utf-8"))
    found = installed()
    problems = audit(found, pins)
    for problem in problems:
        print(f"audit: {problem}", file=sys.stderr)
    if not problems:
        print(f"audit: {len(found)} distributions, all known, pinned and under a licence of the list")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
