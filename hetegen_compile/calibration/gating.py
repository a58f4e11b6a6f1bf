"""What issuing ahead of the host's parts costs and whether it is right and faster here: a profile's ``gate_s``.

A small split model runs both ways on a real accelerator, with the worker and its gates and without. Only if the two
results are the same bits and the step is shorter, a profile states what closing a gate costs, and only then do
schedules issue ahead by default. That is asked of a process of its own: should it hang, it is ended, and the answer is
no.

    python -m hetegen_compile.calibration.gating DEVICE     # prints the answer as JSON
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hetegen_compile.accelerators import Accelerator, CudaAccelerator, Op, StepFacts
from hetegen_compile.accelerators.cuda.gates import Gates, why_no_gates
from hetegen_compile.calibration.kernels import as_program
from hetegen_compile.errors import HetegenError
from hetegen_compile.host_kernels import LINEAR, VECTORISED
from hetegen_compile.host_kernels.program import HostProgram

logger = logging.getLogger("hetegen_compile")

LAYERS = 16
WIDTH = 1024
ROWS = 8192
"""Of the host's weights: one is 16 MiB, a trip's part in a model of some billion parameters. At 60 to 110 GB/s the host
takes 150 to 280 us for it, about as long as issuing a layer does, and all of them are more than a thread's caches
hold."""

LIMIT_S = 120.0
"""For the other process, most of which is spent on importing torch and making a context (13 s on an H200's host), and
on asking again which instructions the compiler has (36 s there)."""

_SHOWN_CHARACTERS = 300
_LAUNCHES = 6
_ROUNDS = 12
_WINDOW = 2

OneStep = Callable[[Accelerator, "SmallModel"], Tensor]


class SmallModel:
    """The weights of the host's parts and of the device's, and the activation that a step begins with."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.device = device
        made = (torch.randn((ROWS, WIDTH), generator=generator) * WIDTH**-0.5).to(torch.bfloat16)
        self.host = [made.roll(layer, 0) for layer in range(LAYERS)]
        self.square = made[:64, :64].to(device)
        self.x = torch.randn((1, WIDTH), generator=generator).to(torch.bfloat16)
        self.like = [torch.empty((1, ROWS), dtype=torch.bfloat16, device="meta")]
        self.part = _part(made)


def _part(rows: Tensor) -> HostProgram:
    """A host part as schedules have it: of a kernel of our own, if this machine can build it."""
    return as_program(LINEAR if VECTORISED.refusal(rows) else VECTORISED, rows)


def step_in_turn(acc: Accelerator, model: SmallModel) -> Tensor:
    """The issuing thread computes each layer's host part and issues what needs it behind it."""
    value = acc.upload(Op("x"), model.x)
    for weight in model.host:
        (x,) = acc.wait_host(Op("received"), acc.to_host(Op("down"), [value]))
        sent = acc.to_accelerator(Op("up"), acc.host(Op("part"), model.part, (x, weight), {}))
        value = _layer(acc, model, acc.wait(Op("arrived"), sent)[0])
    return acc.download(Op("result"), value)


def step_ahead(acc: Accelerator, model: SmallModel) -> Tensor:
    """The worker computes it, ahead of which the next layer is issued."""
    value = acc.upload(Op("x"), model.x)
    sent: list[Any] = []
    for weight in model.host:
        down = acc.to_host(Op("down"), [value])
        if len(sent) >= _WINDOW:
            acc.caught_up(Op("caught up"), sent[-_WINDOW])
        part = acc.host_ahead(Op("part"), model.part, (acc.receive(Op("received"), down)[0], weight), {})
        sent.append(acc.deliver(Op("up"), [part[0]], model.like))
        value = _layer(acc, model, acc.wait(Op("arrived"), sent[-1])[0])
    return acc.download(Op("result"), value)


def _layer(acc: Accelerator, model: SmallModel, value: Any) -> Any:
    for _ in range(_LAUNCHES):
        value = acc.launch(Op("launch"), _mix, (value, model.square))
    return value


def _mix(value: Tensor, square: Tensor) -> Tensor:
    return torch.cat([F.linear(value[:, :64], square), value[:, 64:WIDTH]], dim=-1)


class Answer(NamedTuple):
    """Seconds of closing a gate, or 0 and why nothing is issued ahead; ``times`` are those of a step, in words."""

    gate_s: float
    reason: str = ""
    times: str = ""

    @property
    def source(self) -> str:
        """Where the figure is from, for a profile."""
        return f"0, nothing is issued ahead: {self.reason}" if self.reason else f"measured; {self.times}"


def ask(device: torch.device) -> Answer:
    """What closing a gate costs the issuing thread; 0 where issuing ahead is impossible, wrong or no faster."""
    answer = _asked(device)
    if answer.reason:
        logger.warning("nothing will be issued ahead of the host's parts: %s", answer.reason)
    return answer


def _asked(device: torch.device) -> Answer:
    """What another process finds on the same device."""
    reason = why_no_gates()
    if reason:
        return Answer(0.0, reason)
    command = [sys.executable, "-m", __name__, str(device.index or 0)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Answer(0.0, f"trying it took more than {LIMIT_S:.0f} s")
    if done.returncode:
        return Answer(0.0, f"trying it failed: {done.stderr.strip()[-_SHOWN_CHARACTERS:]}")
    return _read(done.stdout)


def _read(printed: str) -> Answer:
    """The last line that the other process printed; before it a driver or a site's own start-up may have."""
    try:
        return Answer(**json.loads(printed.splitlines()[-1]))
    except (IndexError, TypeError, ValueError):
        return Answer(0.0, f"trying it printed no answer: {printed.strip()[-_SHOWN_CHARACTERS:]!r}")


def answer(device: torch.device, make: Callable[[], Accelerator]) -> Answer:
    """What this process finds on an accelerator of its own."""
    accelerator = make()
    try:
        if accelerator.cannot_issue_ahead:
            return Answer(0.0, accelerator.cannot_issue_ahead)
        found = _tried(accelerator, SmallModel(device))
        return Answer(0.0, found.why_not) if found.why_not else Answer(_closing_s(device), times=found.times)
    except HetegenError as error:
        return Answer(0.0, str(error))
    finally:
        accelerator.close()


class BothWays(NamedTuple):
    """Median seconds of a small step, and whether all results were the same bits."""

    in_turn_s: float
    ahead_s: float
    same: bool

    @property
    def times(self) -> str:
        """In words."""
        return f"a small step takes {self.ahead_s * 1e3:.2f} ms with it, {self.in_turn_s * 1e3:.2f} ms without"

    @property
    def why_not(self) -> str:
        """What is wrong with issuing ahead, or ""."""
        if not self.same:
            return "a step on the worker gave another result"
        return "" if self.ahead_s < self.in_turn_s else self.times


def both_ways(accelerator: Accelerator, model: SmallModel) -> BothWays:
    """The same steps in turn and ahead."""
    with torch.no_grad():
        expected, in_turn_s = _timed(accelerator, model, step_in_turn)
        found, ahead_s = _timed(accelerator, model, step_ahead)
    return BothWays(in_turn_s, ahead_s, all(torch.equal(result, expected[0]) for result in (*expected, *found)))


def _tried(accelerator: Accelerator, model: SmallModel) -> BothWays:
    """Both ways, once more where issuing ahead was right and no faster."""
    found = both_ways(accelerator, model)
    return both_ways(accelerator, model) if found.same and found.why_not else found


def _timed(accelerator: Accelerator, model: SmallModel, step: OneStep) -> tuple[list[Tensor], float]:
    """The results of some steps, and the median seconds of those after the first two."""
    results, seconds = [], []
    for number in range(_ROUNDS):
        started = time.perf_counter()
        accelerator.begin_step(facts=StepFacts(again=number > 0))
        results.append(step(accelerator, model))
        accelerator.end_step()
        seconds.append(time.perf_counter() - started)
    return results, median(seconds[2:])


def _closing_s(device: torch.device) -> float:
    """Seconds of telling the current stream to wait for a gate that the host opens later."""
    gates, stream, seconds = Gates(), torch.cuda.current_stream(device), []
    for _ in range(_ROUNDS):
        number = gates.number()
        try:
            started = time.perf_counter()
            gates.close(number, stream)
            seconds.append(time.perf_counter() - started)
        finally:
            gates.open(number)
        torch.cuda.synchronize(device)
    return median(seconds)


__all__ = ["Answer", "BothWays", "SmallModel", "answer", "ask", "both_ways", "step_ahead", "step_in_turn"]

if __name__ == "__main__":
    torch.cuda.set_device(int(sys.argv[1]))
    print(json.dumps(answer(torch.device("cuda", int(sys.argv[1])), CudaAccelerator)._asdict()))
