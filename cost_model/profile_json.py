"""Load hardware profiles: the presets of this package and JSON files of the user.

A profile file is untrusted text: its size and depth are bounded before anything is decoded, and every
failure is a HardwareProfileError that starts with where the profile came from.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections import Counter
from importlib.resources import files
from typing import Any, NoReturn

from hetegen_compile.cost_model.hardware import SCHEMA_VERSION, HardwareProfile
from hetegen_compile.cost_model.profile_schema import decode, encode, nearest, refuse
from hetegen_compile.errors import HardwareProfileError

MAX_FILE_BYTES = 1_000_000
"""Largest profile file that is read."""

MAX_DEPTH = 8
"""Deepest nesting of objects and lists in a profile (a valid one has five levels)."""

_NAMES = {"schema_version", "name", "description", "sources", "inferred", "host.name", "accelerator.name"}


def preset_names() -> tuple[str, ...]:
    """Names of the profiles that come with the package, sorted."""
    names = (entry.name for entry in files(__package__).joinpath("presets").iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def load_profile(name_or_path: str) -> HardwareProfile:
    """The preset of this name, else the profile in the file at this path.

    Raises HardwareProfileError if neither exists, or the file is not a valid profile.
    """
    names = preset_names()
    if name_or_path in names:
        text = files(__package__).joinpath("presets", f"{name_or_path}.json").read_bytes()
        return profile_from_json(_parse(text, name_or_path), name_or_path)
    return profile_from_json(_parse(_read(name_or_path, names), name_or_path), name_or_path)


def profile_from_json(data: object, origin: str) -> HardwareProfile:
    """Check a decoded JSON object against the schema; ``origin`` (a name or a path) begins every error.

    Raises HardwareProfileError naming the field's path, its value and the remedy.
    """
    try:
        _check_depth(data)
        _check_version(data)
        profile: HardwareProfile = decode(HardwareProfile, data, "")
        _check_paths(profile)
    except HardwareProfileError as error:
        raise HardwareProfileError(f"hardware profile '{origin}': {error}") from None
    return profile


def profile_to_json(profile: HardwareProfile) -> dict[str, Any]:
    """The profile as an object that ``json.dumps`` writes and ``profile_from_json`` reads back equal."""
    encoded: dict[str, Any] = encode(profile)
    return encoded


def unsourced_fields(profile: HardwareProfile) -> tuple[str, ...]:
    """Paths of the figures for which ``profile.sources`` has no entry, neither theirs nor a parent's."""
    figures = (path for path in _paths(encode(profile), leaves_only=True) if path not in _NAMES)
    return tuple(path for path in figures if not any(_covers(key, path) for key in profile.sources))


def _read(path: str, names: tuple[str, ...]) -> bytes:
    place = os.path.expanduser(path)
    if not os.path.isfile(place):
        hint = f"give the path of a .json file or a preset; {nearest(path, names)}"
        raise HardwareProfileError(f"hardware profile '{path}' is neither a preset nor a file: {hint}")
    try:
        with open(place, "rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise HardwareProfileError(f"hardware profile '{path}' cannot be read: {error.strerror}") from error
    if len(text) > MAX_FILE_BYTES:
        remedy = f"larger than {MAX_FILE_BYTES} bytes, no profile is: give another file"
        raise HardwareProfileError(f"hardware profile '{path}' is {remedy}")
    return text


def _parse(text: bytes, origin: str) -> object:
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise HardwareProfileError(f"hardware profile '{origin}': nested too deep to be a profile") from error
    except HardwareProfileError as error:
        raise HardwareProfileError(f"hardware profile '{origin}': {error}") from None
    except ValueError as error:
        raise HardwareProfileError(f"hardware profile '{origin}' is not valid JSON: {error}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise HardwareProfileError(f"it contains {name}: give a finite number")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise HardwareProfileError(f"the key {reprlib.repr(twice)} occurs twice in one object: remove one")
    return result


def _check_depth(data: object) -> None:
    level = [data]
    for _ in range(MAX_DEPTH):
        inner = [list(item.values()) if isinstance(item, dict) else item for item in level]
        level = [child for item in inner if isinstance(item, list) for child in item]
    if any(isinstance(item, dict | list) for item in level):
        raise HardwareProfileError(f"nested deeper than {MAX_DEPTH} levels: not a profile")


def _check_version(data: object) -> None:
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        remedy = f"this version reads up to {SCHEMA_VERSION}; upgrade hetegen or calibrate anew"
        refuse("schema_version", version, remedy)


def _check_paths(profile: HardwareProfile) -> None:
    valid = set(_paths(encode(profile, whole=True), leaves_only=False))
    for path in (*profile.sources, *profile.inferred):
        if path not in valid:
            where = "an entry of sources" if path in profile.sources else "an entry of inferred"
            refuse(where, path, "names no field of the profile; give a dotted path such as 'host.launch_s'")


def _paths(data: dict[str, Any], *, leaves_only: bool, prefix: str = "") -> list[str]:
    """Dotted paths of the fields of an encoded profile; ``sources`` counts as one field."""
    found: list[str] = []
    for key, value in data.items():
        inner = isinstance(value, dict) and key != "sources"
        if not (inner and leaves_only):
            found.append(prefix + key)
        if inner:
            found += _paths(value, leaves_only=leaves_only, prefix=f"{prefix}{key}.")
    return found


def _covers(key: str, path: str) -> bool:
    return path == key or path.startswith(f"{key}.")
