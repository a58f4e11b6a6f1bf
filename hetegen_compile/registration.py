"""The backend's name where the package is imported from a checkout (``PYTHONPATH=.``) and is not installed.

Torch finds backends by the entry points of installed distributions. Importing hetegen_compile adds the checkout as one
more distribution, behind all installed ones: an installed hetegen is found first and this one is not looked at.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path

GROUP = "torch_dynamo_backends"
NAME = "hetegen"
ENTRY_POINT = "hetegen_compile.backend:hetegen"

_FILES = {
    "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0+checkout\n",
    "entry_points.txt": f"[{GROUP}]\n{NAME} = {ENTRY_POINT}\n",
}

_EVERYTHING = DistributionFinder.Context()


class Checkout(Distribution):
    """The package as it lies in the folder that it was imported from."""

    def read_text(self, filename: str) -> str | None:
        """What an installation would have written down under this name."""
        return _FILES.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        """A file beside the package."""
        return Path(__file__).parents[1] / path


class CheckoutFinder(DistributionFinder):
    """Finds the distribution, and no modules."""

    def find_spec(self, *_: object) -> None:
        """Modules are found by others."""

    def find_distributions(self, context: DistributionFinder.Context = _EVERYTHING) -> Iterator[Checkout]:
        """The checkout, if it or everything is asked for."""
        if context.name in (None, NAME):
            yield Checkout()


def register_checkout() -> None:
    """Add the finder, once a process, behind all others."""
    if not any(isinstance(finder, CheckoutFinder) for finder in sys.meta_path):
        sys.meta_path.append(CheckoutFinder())
