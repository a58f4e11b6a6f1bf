"""The split that steps are planned with: that of the options, unless the caller asks for another one."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from hetegen_compile.planned import Split

_override: contextvars.ContextVar[Split | None] = contextvars.ContextVar("hetegen_split", default=None)


@contextlib.contextmanager
def override_split(split: Split) -> Iterator[None]:
    """Run compiled graphs with another split, from the capture and the segments that they have already.

    Plans made under it are kept, so comparing 0.0 (all streamed), 1.0 (all on the host) and "auto" costs no
    second compilation. Residency stays as it was decided.
    """
    token = _override.set(split)
    try:
        yield
    finally:
        _override.reset(token)


def overridden_split() -> Split | None:
    """What ``override_split`` asks for where this is called, or None."""
    return _override.get()


__all__ = ["overridden_split", "override_split"]
