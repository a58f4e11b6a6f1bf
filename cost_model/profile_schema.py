"""Decode plain JSON values into the profile's dataclasses, checking each value against its annotation.

Everything that is wrong is a HardwareProfileError with the field's path, the value and the remedy. The
annotations in ``hardware`` are the schema: there is no second description of it to keep in step.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from hetegen_compile.cost_model.hardware import Bounds, KernelChoice, RateCurve, RateTable
from hetegen_compile.errors import HardwareProfileError

MAX_TEXT = 4000
"""Longest text in a profile, in characters."""

MAX_PATH = 200
"""How much of a field's path an error shows, in characters: keys of a file are not bounded."""

MAX_ENTRIES = 1000
"""Most points in a curve and most entries in a mapping or a list."""

_T = TypeVar("_T")

_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_.]*")


def decode(hint: Any, value: object, path: str) -> Any:
    """The value as the annotated type ``hint``; ``path`` names the field in errors ("" for the whole)."""
    if hint is str:
        return _text(value, path)
    if hint in _FORMS:
        return _FORMS[hint](value, path)
    if is_dataclass(hint) and isinstance(hint, type):
        return _record(hint, value, path)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _number(arguments[0], arguments[1], value, path)
    if origin is Mapping:
        return _mapping(arguments[1], value, path)
    return tuple(decode(str, item, f"{path}[{index}]") for index, item in enumerate(_items(value, path)))


def encode(value: object, *, whole: bool = False) -> Any:
    """The inverse of ``decode``: plain dicts and lists; optional fields that are as by default only if ``whole``."""
    if isinstance(value, RateTable):
        return _encode_table(value)
    if isinstance(value, RateCurve | KernelChoice):
        return [list(point) for point in value.points]
    if is_dataclass(value):
        return {
            item.name: encode(getattr(value, item.name), whole=whole)
            for item in fields(value)
            if whole or not (_optional(item) and getattr(value, item.name) in (item.default, {}))
        }
    if isinstance(value, Mapping):
        return {key: encode(item, whole=whole) for key, item in value.items()}
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


_POSITIVE = Bounds(0.0, 1e24)


def _positive(value: object, path: str) -> float:
    return _number(float, _POSITIVE, value, path)


def _curve(value: object, path: str) -> RateCurve:
    return _checked(RateCurve, _pairs(value, path, _positive), value, path)


def _kernels(value: object, path: str) -> KernelChoice:
    return _checked(KernelChoice, _pairs(value, path, _text), value, path)


def _table(value: object, path: str) -> RateTable:
    """One curve for every size (a list of pairs), or a list of curves, each with its bytes."""
    items = _items(value, path)
    if not all(isinstance(item, dict) for item in items) or not items:
        return RateTable.of(_curve(value, path))
    curves = []
    for index, item in enumerate(items):
        record: _SizedCurve = _record(_SizedCurve, item, f"{path}[{index}]")
        curves.append((record.weight_bytes, record.points))
    return _checked(RateTable, tuple(curves), value, path)


def _encode_table(table: RateTable) -> Any:
    if table == RateTable.of(table.curves[0][1]):
        return encode(table.curves[0][1])
    return [{"weight_bytes": nbytes, "points": encode(curve)} for nbytes, curve in table.curves]


def _pairs(value: object, path: str, second: Callable[[object, str], Any]) -> tuple[tuple[float, Any], ...]:
    """A list of pairs of a positive number and what ``second`` decodes."""
    pairs = []
    for index, item in enumerate(_items(value, path)):
        pair = _items(item, f"{path}[{index}]")
        if len(pair) != 2:
            refuse(f"{path}[{index}]", pair, "give a pair [x, rate]" if second is not _text else "give [tokens, name]")
        first = _positive(pair[0], f"{path}[{index}][0]")
        pairs.append((first, second(pair[1], f"{path}[{index}][1]")))
    return tuple(pairs)


def _checked(kind: Callable[[Any], _T], argument: object, value: object, path: str) -> _T:
    """``kind(argument)``, whose own check is reported with the field's path."""
    try:
        return kind(argument)
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
    for item in fields(kind):
        if item.name not in value and not _optional(item):
            raise HardwareProfileError(f"{prefix}{item.name} is missing: add it (the presets show an example)")
    given = {name: hint for name, hint in hints.items() if name in value}
    return kind(**{name: decode(hint, value[name], f"{prefix}{name}") for name, hint in given.items()})


def _optional(item: Field[Any]) -> bool:
    return item.default is not MISSING or item.default_factory is not MISSING


@dataclass(frozen=True)
class _SizedCurve:
    """An entry of a rate table in a file."""

    weight_bytes: Annotated[float, _POSITIVE]
    points: RateCurve


_FORMS: Mapping[Any, Callable[[object, str], Any]] = {RateCurve: _curve, RateTable: _table, KernelChoice: _kernels}
"""Types that files write as lists."""
