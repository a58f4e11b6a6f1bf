"""The options of ``torch.compile(..., backend="hetegen", options={...})``: parsed and validated here only.

Sizes are bytes. Decimal units (kB, MB, GB, TB) count in powers of 1000, binary ones (KiB, MiB, GiB, TiB) in
powers of 1024.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from numbers import Integral, Real
from typing import Literal, get_args

from hetegen_compile.errors import OptionError

AcceleratorChoice = Literal["auto", "cuda", "emulated"]

_UNIT_BYTES = {
    "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]{0,3})\s*")
_LARGEST = 2**62
"""Of whole numbers: sizes in bytes, tokens, sequences, seeds. More is a mistake, and no arithmetic overflows below."""
_SHOWN_CHARACTERS = 200
_SIZE_HELP = 'bytes as an int, or a number with a unit such as "8GiB", "512 MiB" or "1.5GB"'


@dataclass(frozen=True)
class Options:
    """What a user may choose; the defaults are what an empty ``options`` means.

    Attributes:
        gpu_memory: bytes that hetegen may use on the accelerator; None: what is free, less a reserve.
        accelerator: the device behind the schedule; "auto" takes CUDA where there is a device.
        hardware: "auto" (calibrated once, cached), a preset's name or the path of a profile.
        context: tokens of KV cache that the budget must hold; None: twice what comes in, where there is room.
        max_batch: sequences that the budget must hold.
        split: share in [0, 1] of every Linear's rows, and of streamed experts, on the host; "auto": by the costs.
        pair_mlp: whether MLP blocks are cut as one, so that what lies between their Linears stays where it is: "auto"
            leaves it to the cost model; True: every block, and nothing of them is resident; False: none.
        issue_ahead: whether the host's parts are computed by a worker thread, so that what needs them is issued
            meanwhile: "auto": where the hardware profile knows what a gate costs; True: wherever it is possible; False.
        cuda_graphs: whether launches of a step that follow each other are chains, which a CUDA device records and
            issues as one graph; False: each launch is issued by itself.
        pace: emulated accelerator only: lanes take the hardware profile's time times this; None: no pacing.
        print_schedule: print the annotated table at compile time.
        seed: seed of the emulated accelerator's random delays; None: no delays.
        unfold: print every layer of the table instead of folding equal ones.
    """

    gpu_memory: int | None = None
    accelerator: AcceleratorChoice = "auto"
    hardware: str = "auto"
    context: int | None = None
    max_batch: int = 1
    split: float | Literal["auto"] = "auto"
    pair_mlp: bool | Literal["auto"] = "auto"
    issue_ahead: bool | Literal["auto"] = "auto"
    cuda_graphs: bool = True
    pace: float | None = None
    print_schedule: bool = True
    seed: int | None = None
    unfold: bool = False


def parse_options(options: Mapping[str, object] | None) -> Options:
    """Validate what the user gave; keys that are missing take their defaults.

    Raises:
        OptionError: an unknown key (names the nearest valid one), a wrong type, a value out of range, or
            options that exclude each other.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"options must be a dict, not {_shown(options)}")
    given = dict(options or {})
    _check_keys(given)
    values = {**asdict(Options()), **given}
    parsed = Options(
        gpu_memory=_size("gpu_memory", values),
        accelerator=_accelerator("accelerator", values),
        hardware=_text("hardware", values),
        context=_optional_whole("context", values, at_least=1),
        max_batch=_whole("max_batch", values, at_least=1),
        split=_share("split", values),
        pair_mlp=_choice_or_flag("pair_mlp", values),
        issue_ahead=_choice_or_flag("issue_ahead", values),
        cuda_graphs=_flag("cuda_graphs", values),
        pace=_factor("pace", values),
        print_schedule=_flag("print_schedule", values),
        seed=_optional_whole("seed", values, at_least=0),
        unfold=_flag("unfold", values),
    )
    for key in ("pace", "seed"):
        if parsed.accelerator == "cuda" and getattr(parsed, key) is not None:
            raise OptionError(
                f"option {key!r} = {getattr(parsed, key)!r} is the emulated accelerator's and has no meaning with "
                "accelerator='cuda': leave it out or choose accelerator='emulated'"
            )
    return parsed


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "8GiB", "8GB", "512 MiB" or "1.5GB" (case does not matter; no unit: bytes).

    Raises:
        OptionError: ``text`` is not a size.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNIT_BYTES.get((match[2] or "b").lower()) if match else None
    if match is None or unit is None:
        raise OptionError(
            f"{_shown(text)} is not a size: expected {_SIZE_HELP}; units are B, kB, MB, GB, TB (powers of 1000) "
            "and KiB, MiB, GiB, TiB (powers of 1024)"
        )
    return int(Fraction(match[1]) * unit)


def format_bytes(n: float) -> str:
    """``n`` bytes in the binary unit that fits, such as "1.50 GiB"; whole bytes below 1 KiB."""
    if abs(n) < 1024:
        return f"{n:.0f} B"
    value = float(n)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if round(abs(value), 2) < 1024:
            return f"{value:.2f} {unit}"
    return f"{value / 1024:.2f} TiB"


def _check_keys(given: Mapping[str, object]) -> None:
    valid = [field.name for field in fields(Options)]
    for key in given:
        if key not in valid:
            nearest = difflib.get_close_matches(_shown(key).strip("'"), valid, n=1, cutoff=0.0)[0]
            raise OptionError(f"unknown option {_shown(key)}: did you mean {nearest!r}? Valid: {', '.join(valid)}")


def _invalid(key: str, value: object, expected: str) -> OptionError:
    return OptionError(f"option {key!r} = {_shown(value)}: expected {expected}")


def _shown(value: object) -> str:
    """``repr`` for a message: cut where it is long, the type's name where there is none."""
    try:
        text = repr(value)
    except Exception:  # whatever a foreign __repr__ raises, the option is the error to tell
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _size(key: str, values: Mapping[str, object]) -> int | None:
    value = values[key]
    if value is None:
        return None
    if isinstance(value, str):
        try:
            nbytes = parse_bytes(value)
        except OptionError as error:
            raise OptionError(f"option {key!r}: {error}") from None
    elif isinstance(value, Integral) and not isinstance(value, bool):
        nbytes = int(value)
    else:
        raise _invalid(key, value, f"{_SIZE_HELP}, or None")
    if not 0 < nbytes <= _LARGEST:
        raise _invalid(key, value, f"more than 0 bytes and at most 4 EiB: {_SIZE_HELP}")
    return nbytes


def _accelerator(key: str, values: Mapping[str, object]) -> AcceleratorChoice:
    choices: tuple[AcceleratorChoice, ...] = get_args(AcceleratorChoice)
    for choice in choices:
        if isinstance(values[key], str) and values[key] == choice:
            return choice
    raise _invalid(key, values[key], "one of " + ", ".join(map(repr, choices)))


def _text(key: str, values: Mapping[str, object]) -> str:
    value = values[key]
    if not isinstance(value, str) or not value.strip():
        raise _invalid(key, value, "'auto', the name of a preset or the path of a profile's .json file")
    return value


def whole_number(name: str, value: object, *, at_least: int) -> int:
    """``value`` as an int; OptionError naming the option or argument ``name`` if it is none, or out of range."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not at_least <= int(value) <= _LARGEST:
        raise OptionError(f"{name} = {_shown(value)}: expected a whole number of at least {at_least} and at most 2**62")
    return int(value)


def _whole(key: str, values: Mapping[str, object], *, at_least: int) -> int:
    return whole_number(f"option {key!r}", values[key], at_least=at_least)


def _optional_whole(key: str, values: Mapping[str, object], *, at_least: int) -> int | None:
    return None if values[key] is None else _whole(key, values, at_least=at_least)


def _share(key: str, values: Mapping[str, object]) -> float | Literal["auto"]:
    value = values[key]
    if isinstance(value, str) and value == "auto":
        return "auto"
    share = _real(value)
    if not 0 <= share <= 1:
        raise _invalid(key, value, "'auto' or a number from 0 (nothing on the host) to 1 (everything)")
    return share


def _factor(key: str, values: Mapping[str, object]) -> float | None:
    value = values[key]
    if value is None:
        return None
    factor = _real(value)
    if not 0 < factor < math.inf:
        raise _invalid(key, value, "a positive factor such as 10.0, or None for no pacing")
    return factor


def _real(value: object) -> float:
    """A number as a float; NaN, which fails every comparison, for anything else."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def _choice_or_flag(key: str, values: Mapping[str, object]) -> bool | Literal["auto"]:
    value = values[key]
    if isinstance(value, str) and value == "auto":
        return "auto"
    if not isinstance(value, bool):
        raise _invalid(key, value, "'auto', True or False")
    return value


def _flag(key: str, values: Mapping[str, object]) -> bool:
    value = values[key]
    if not isinstance(value, bool):
        raise _invalid(key, value, "True or False")
    return value
