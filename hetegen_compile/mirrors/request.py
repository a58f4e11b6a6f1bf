"""What a step asks the mirrors for."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MIRRORS = "mirrors"
"""The category of everything but resident weights."""
WEIGHTS = "weights"
"""The category under which resident weights are counted."""


class Request(NamedTuple):
    """A host tensor whose device value is wanted.

    ``category`` is what its bytes count under. ``whole`` asks for a view of the mirrored storage, because the graph
    writes that and has another input in it. ``watched`` asks that writes which no version shows are found: the
    tensor belongs to the model. Small tensors are always watched. ``base`` is what is uploaded instead, if ``tensor``
    is the last rows of that.
    """

    tensor: Tensor
    name: str
    category: str = MIRRORS
    whole: bool = False
    base: Tensor | None = None
    watched: bool = False


__all__ = ["MIRRORS", "WEIGHTS", "Request"]
