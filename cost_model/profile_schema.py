"""Decode plain JSON values into the profile's dataclasses, checking each value against its annotation.

Everything that is wrong is a HardwareProfileError with the field's path, the value and the remedy. The
annotations in ``hardware`` are the schema: there is no second description of it to keep in step.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

from hetegen_compile.cost_model.hardware import Bounds, RateCurve
from hetegen_compile.errors import HardwareProfileError

MAX_TEXT = 4000
"""Longest text in a profile, in characters."""

MAX_PATH = 200
"""How much of a field's path an error shows, in characters: keys of a file are not bounded."""

MAX_ENTRIES = 1000
"""Most points in a curve and most entries in a mapping or a list."""

_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_.]*")


def decode(hint: Any, value: object, path: str) -> Any:
    """The value as the annotated type ``hint``; ``path`` names the field in errors ("" for the whole)."""
    if hint is str:
        return _text(value, path)
    if hint is RateCurve:
        return _curve(value, path)
    if is_dataclass(hint) and isinstance(hint, type):
        return _record(hint, value, path)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _number(arguments[0], arguments[1], value, path)
    if origin is Mapping:
        return _mapping(arguments[1], value, path)
    return tuple(decode(str, item, f"{path}[{index}]") for index, item in enumerate(_items(value, path)))


def encode(value: object) -> Any:
    """The inverse of ``decode``: dataclasses and curves as plain dicts and lists."""
    if isinstance(value, RateCurve):
        return [list(point) for point in value.points]
    if is_dataclass(value):
        return {item.name: encode(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def refuse(path: str, value: object, remedy: str) -> NoReturn:
    """Raise the HardwareProfileError of one field."""
    raise HardwareProfileError(f"{path[:MAX_PATH] or 'the profile'} is {reprlib.repr(value)}: {remedy}")


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint at the valid name that is closest to ``name``, with all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(name[:MAX_PATH], names, n=1)
    return (f"did you mean '{close[0]}'? " if close else "") + "valid: " + ", ".join(names)


def _text(value: object, path: str) -> str:
    if not isinstance(value, str):
        refuse(path, value, "give a string")
    if not value.strip() or len(value) > MAX_TEXT:
        refuse(path, value, f"give a text of 1 to {MAX_TEXT} characters")
    return value


def _number(kind: type, bounds: Bounds, value: object, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(path, value, "give a number")
    if kind is int and not isinstance(value, int):
        refuse(path, value, "give a whole number, written without a point or an exponent")
    above = value >= bounds.low if bounds.low_included else value > bounds.low
    if not (above and value <= bounds.high):  # NaN fails both comparisons
        relation = "at least" if bounds.low_included else "more than"
        refuse(path, value, f"give a number {relation} {bounds.low:g} and at most {bounds.high:g}")
    return value if kind is int else float(value)


def _items(value: object, path: str) -> list[object]:
    if not isinstance(value, list) or len(value) > MAX_ENTRIES:
        refuse(path, value, f"give a list of at most {MAX_ENTRIES} entries")
    return value


def _curve(value: object, path: str) -> RateCurve:
    positive = Bounds(0.0, 1e24)
    points = []
    for index, item in enumerate(_items(value, path)):
        pair = _items(item, f"{path}[{index}]")
        if len(pair) != 2:
            refuse(f"{path}[{index}]", pair, "give a pair [x, rate]")
        x, rate = (_number(float, positive, pair[end], f"{path}[{index}][{end}]") for end in (0, 1))
        points.append((x, rate))
    try:
        return RateCurve(tuple(points))
    except HardwareProfileError as error:
        refuse(path, value, str(error))


def _mapping(hint: Any, value: object, path: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not 0 < len(value) <= MAX_ENTRIES:
        refuse(path, value, f"give an object of 1 to {MAX_ENTRIES} entries")
    for key in value:
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            refuse(path, key, "a key consists of letters, digits, '_' and '.', for example 'float32'")
    return {key: decode(hint, item, f"{path}.{key}") for key, item in value.items()}


def _record(kind: type, value: object, path: str) -> Any:
    if not isinstance(value, dict):
        refuse(path, value, "give an object")
    hints = get_type_hints(kind, include_extras=True)
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            refuse(f"{prefix}{key}", value[key], f"unknown field; {nearest(str(key), hints)}")
    for name in hints:
        if name not in value:
            raise HardwareProfileError(f"{prefix}{name} is missing: add it (the presets show an example)")
    return kind(**{name: decode(hint, value[name], f"{prefix}{name}") for name, hint in hints.items()})
