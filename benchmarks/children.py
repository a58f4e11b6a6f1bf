"""Work in processes of its own, which may hang, crash or fail: what it had noted down until then is kept.

The parent starts ``python -m MODULE ARGUMENT NOTES``, the child answers with ``child_main``. Notes are one JSON file
that the child writes anew with each entry. A child that exceeds its limit is asked where it stands (the frames of its
threads go to its log) and killed with its own children.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hetegen_compile.files import write_private

_LOG_CHARACTERS = 3000
_DIE_WITH_PARENT = 1
"""``PR_SET_PDEATHSIG`` of Linux: a killed child's own children do not go on alone."""

_FRAMES_S, _END_S = 1.0, 2.0
"""Seconds that a hanging child gets to write down its frames, and that its own children get to end: a compiler that is
killed leaves half a library, which torch takes for a whole one ever after."""


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        status: "ok", "failed" (exit status or signal) or "timeout"; who asked for it may have others.
        seconds: wall-clock.
        notes: what it wrote down.
        reason: why it is not ok, with the end of its log.
    """

    status: str
    seconds: float
    notes: dict[str, Any]
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether it came to its end."""
        return self.status == "ok"


class Notebook:
    """Entries that survive the process: a JSON file, written whole with each of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: dict[str, Any] = {}

    def note(self, name: str, value: Any) -> None:
        """Add an entry or replace it; JSON values only."""
        self.entries[name] = value
        write_json(self._path, self.entries)


def write_json(path: Path, value: Any) -> None:
    """Write a file whole: whoever reads it finds the old text or the new one."""
    write_private(path, json.dumps(value, indent=1) + "\n")


def run_child(
    module: str,
    argument: Mapping[str, Any],
    *,
    limit_s: float,
    files: Path,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Outcome:
    """Run ``python -m module`` with a JSON argument; ``files`` plus ".json" and ".log" are its notes and its output.

    ``environment`` is added to this process's.
    """
    notes, log = files.with_name(files.name + ".json"), files.with_name(files.name + ".log")
    notes.unlink(missing_ok=True)
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(argument), str(notes)],
            stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        try:
            code: int | None = process.wait(max(limit_s, 0.0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    seconds = time.monotonic() - started
    if code == 0:
        return Outcome("ok", seconds, _read(notes))
    end = log.read_text(errors="replace")[-_LOG_CHARACTERS:].strip()
    if code is None:
        return Outcome("timeout", seconds, _read(notes), f"killed after its limit of {limit_s:.0f} s\n{end}")
    return Outcome("failed", seconds, _read(notes), f"exit status {code}\n{end}")


def child_main(work: Callable[[dict[str, Any], Notebook], None]) -> int:
    """The whole of a child: its argument and its notes from the command line; 1 and a note if ``work`` raises."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    with contextlib.suppress(OSError):  # where memory runs out, this process is ended and not the one that waits for it
        Path("/proc/self/oom_score_adj").write_text("1000")
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    notebook = Notebook(Path(sys.argv[2]))
    try:
        work(json.loads(sys.argv[1]), notebook)
    except Exception as error:
        traceback.print_exc()
        notebook.note("error", f"{type(error).__name__}: {error}"[:_LOG_CHARACTERS])
        return 1
    return 0


def trust_what_was_built() -> None:
    """Let Inductor believe that instructions can be used with which an earlier process has run its sample.

    Torch 2.11 starts a process that imports torch for each set of instructions, in every process that builds or loads
    code for the host: 36 s on a server with AMX, most of a stage's time.
    """
    try:
        from torch._inductor import cpu_vec_isa

        check = cpu_vec_isa.VecISA.check_build
    except (ImportError, AttributeError):
        return
    built = Path(tempfile.gettempdir()) / f"hetegen-benchmarks-isa-{os.getuid()}"

    def check_build(self: Any, code: str) -> bool:
        known = built / hashlib.sha256(f"{version('torch')} {self} {code}".encode()).hexdigest()
        if known.exists() or not check(self, code):  # what failed may do so for want of time: it is tried again
            return known.exists()
        built.mkdir(exist_ok=True)
        known.touch()
        return True

    cpu_vec_isa.VecISA.check_build = check_build  # type: ignore[method-assign]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Make sure that nothing of the child is left, having asked it for its frames if it still runs."""
    if process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_FRAMES_S)
        with contextlib.suppress(ProcessLookupError):  # until none of them is left
            os.killpg(process.pid, signal.SIGTERM)
            end_s = time.monotonic() + _END_S
            while time.monotonic() < end_s:
                process.poll()  # reaps the child; its own children may outlive it
                os.killpg(process.pid, 0)
                time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(notes: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(notes.read_text()) if notes.exists() else {}
    return found
