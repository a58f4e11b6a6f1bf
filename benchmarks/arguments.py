"""What the command lines of benchmarks have in common."""

from __future__ import annotations

import argparse
from pathlib import Path


def output_file(text: str) -> Path:
    """A file to write results to, for ``type=``: what is wrong with it is told before anything is measured."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder '{path.parent}'")
    return path


__all__ = ["output_file"]
