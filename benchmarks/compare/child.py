"""One way of the comparison in a process of its own: ``python -m benchmarks.compare.child JOB NOTES``."""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.children import Notebook, child_main, trust_what_was_built
from benchmarks.compare.job import Job
from benchmarks.compare.ways import WAYS


def work(argument: dict[str, Any], notebook: Notebook) -> None:
    """Note each row as it is measured."""
    trust_what_was_built()
    job = Job(**argument)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    rows: list[dict[str, Any]] = []
    for row in WAYS[job.way](job):
        rows.append(row.to_json())
        notebook.note("rows", rows)


if __name__ == "__main__":
    sys.exit(child_main(work))
