"""One stage in a process of its own: ``python -m benchmarks.gpu.child ARGUMENT NOTES``."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch._inductor import config as inductor_config

from benchmarks.children import Notebook, child_main, trust_what_was_built
from benchmarks.gpu.settings import Settings, SkipError
from benchmarks.gpu.stages import stage_work


def work(argument: dict[str, Any], notebook: Notebook) -> None:
    """Run the stage; one that cannot be run here says so and is no failure."""
    trust_what_was_built()
    settings = Settings(**argument["settings"])
    if settings.cuda and argument["stage"] != "environment":  # which tells of the whole machine
        share_processors(argument["beside"])
    else:
        torch.set_num_threads(1)
    try:
        stage_work(argument["stage"])(settings, notebook)
    except SkipError as reason:
        notebook.note("skipped", str(reason))


def share_processors(beside: int) -> None:
    """Threads that compute, and processes that compile, for one of so many stages that run at the same time.

    Threads that spin for each other on too few processors take many times longer than fewer threads.
    """
    torch.set_num_threads(max(1, torch.get_num_threads() // beside))
    inductor_config.compile_threads = max(1, (inductor_config.compile_threads or 1) // beside)


if __name__ == "__main__":
    sys.exit(child_main(work))
