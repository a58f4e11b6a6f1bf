"""What steps are planned with: the options, unless the caller asks for something else for a while."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import TypeVar

from hetegen_compile.options import parse_options
from hetegen_compile.planning.planned import Split

T = TypeVar("T")

_split: contextvars.ContextVar[Split | None] = contextvars.ContextVar("hetegen_split", default=None)
_issue_ahead: contextvars.ContextVar[bool | None] = contextvars.ContextVar("hetegen_issue_ahead", default=None)


def override_split(split: Split) -> contextlib.AbstractContextManager[None]:
    """Run compiled graphs with another split, from the capture and the segments that they have already.

    Plans made under it are kept, so comparing 0.0 (all streamed), 1.0 (all on the host) and "auto" costs no
    second compilation. Residency stays as it was decided.

    Raises:
        OptionError: when it is called, if ``split`` is nothing that the option of this name may be.
    """
    return _set(_split, parse_options({"split": split}).split)


def override_issue_ahead(wanted: bool | None) -> contextlib.AbstractContextManager[None]:
    """Plan compiled graphs with another ``issue_ahead`` (None: that of the options), as ``override_split`` does.

    So one process measures steps issued ahead and in turn, with the same capture and segments.
    """
    return _set(_issue_ahead, wanted)


def overridden_split() -> Split | None:
    """What ``override_split`` asks for where this is called, or None."""
    return _split.get()


def overridden_issue_ahead() -> bool | None:
    """What ``override_issue_ahead`` asks for where this is called, or None."""
    return _issue_ahead.get()


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


__all__ = ["overridden_issue_ahead", "overridden_split", "override_issue_ahead", "override_split"]
