"""A child that does what its argument says; see ``benchmarks.children``."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.children import Notebook, child_main


def work(argument: dict[str, Any], notebook: Notebook) -> None:
    """Note what was asked for, then end in one of the ways a child may end."""
    notebook.note("asked", argument)
    print("said something")
    sys.stdout.flush()
    if argument["how"] == "raise":
        raise ValueError("no such thing")
    if argument["how"] == "die":
        os._exit(7)
    if argument["how"] == "compile":
        half = f"trap 'sleep 0.3; rm {argument['made']}; exit' TERM; touch {argument['made']}; sleep 60 & wait"
        subprocess.run(["sh", "-c", half], check=False)
    if argument["how"] == "hang":
        time.sleep(60)
    notebook.note("told", os.environ.get("HETEGEN_OF_TESTS"))
    notebook.note("done", True)


if __name__ == "__main__":
    sys.exit(child_main(work))
