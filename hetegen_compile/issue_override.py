"""Whether steps are issued ahead: what the options say, unless the caller asks otherwise."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_override: contextvars.ContextVar[bool | None] = contextvars.ContextVar("hetegen_issue_ahead", default=None)


@contextlib.contextmanager
def override_issue_ahead(wanted: bool | None) -> Iterator[None]:
    """Plan compiled graphs with another ``issue_ahead`` (None: that of the options), as ``override_split`` does.

    So one process measures steps issued ahead and in turn, with the same capture, segments and residency.
    """
    token = _override.set(wanted)
    try:
        yield
    finally:
        _override.reset(token)


def overridden_issue_ahead() -> bool | None:
    """What ``override_issue_ahead`` asks for where this is called, or None."""
    return _override.get()


__all__ = ["overridden_issue_ahead", "override_issue_ahead"]
