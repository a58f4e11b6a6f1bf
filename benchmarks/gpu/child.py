"""One stage in a process of its own: ``python -m benchmarks.gpu.child ARGUMENT NOTES``."""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.children import Notebook, child_main
from benchmarks.gpu.settings import Settings, SkipError
from benchmarks.gpu.stages import stage_work


def work(argument: dict[str, Any], notebook: Notebook) -> None:
    """Run the stage; one that cannot be run here says so and is no failure."""
    settings = Settings(**argument["settings"])
    if not settings.cuda:
        torch.set_num_threads(1)
    try:
        stage_work(argument["stage"])(settings, notebook)
    except SkipError as reason:
        notebook.note("skipped", str(reason))


if __name__ == "__main__":
    sys.exit(child_main(work))
