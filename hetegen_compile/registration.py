"""The backend's name where the package is imported from a checkout (``PYTHONPATH=.``) and is not installed.

An installed package needs none of this: torch finds the entry point by itself. Without one, torch knows the name
after ``import hetegen_compile``.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import cache
from typing import Any

GROUP = "torch_dynamo_backends"
NAME = "hetegen"


@cache
def register_unless_installed() -> bool:
    """Tell torch the backend's name unless an installed package does; whether it was told here."""
    if importlib.metadata.entry_points(group=GROUP, name=NAME):
        return False
    import torch._dynamo

    torch._dynamo.register_backend(hetegen, name=NAME)
    return True


def hetegen(*args: Any, **options: Any) -> Callable[..., Any]:
    """``hetegen_compile.backend.hetegen``, loaded with its first graph."""
    backend: Any = importlib.import_module("hetegen_compile.backend")
    compiled: Callable[..., Any] = backend.hetegen(*args, **options)
    return compiled
