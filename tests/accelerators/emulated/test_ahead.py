"""What the emulated accelerator refuses of steps that are issued ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hetegen_compile.accelerators import EmulatedAccelerator, Op, StepFacts
from hetegen_compile.errors import MissingWaitError, ScheduleError
from tests.accelerators.ahead_steps import LIKE
from tests.accelerators.schedules import HOST_ROWS, WIDTH


def test_a_promise_is_no_tensor_for_anybody_else() -> None:
    acc = EmulatedAccelerator()
    acc.begin_step()
    received: Any = acc.receive(Op("r"), acc.to_host(Op("d"), [acc.upload(Op("x"), torch.ones(2))]))
    uses: list[Callable[[], Any]] = [
        lambda: acc.host(Op("h"), torch.neg, (received[0],), {}),
        lambda: acc.launch(Op("l"), torch.neg, (received[0],)),
        lambda: torch.neg(received[0]),
        lambda: acc.to_accelerator(Op("u"), [received[0]]),
    ]
    for use in uses:
        with pytest.raises((MissingWaitError, ScheduleError)):
            use()
    value = acc.upload(Op("y"), torch.ones(2))
    with pytest.raises(MissingWaitError, match="h2 uses y without the wait"):
        acc.host_ahead(Op("h2"), torch.neg, (value,), {})
    acc.close()


def test_what_a_download_reads_is_not_written_before_the_worker_has_it() -> None:
    acc = EmulatedAccelerator()
    acc.begin_step()
    value = acc.launch(Op("x"), torch.ones, (2,))
    down = acc.to_host(Op("d"), [value])
    received = acc.receive(Op("r"), down)
    sent = acc.deliver(Op("u"), [received[0]], [torch.empty(2, device="meta")])
    with pytest.raises(MissingWaitError, match="add overwrites what d is still copying"):
        acc.launch(Op("add"), torch.Tensor.add_, (value, 1), mutates=(0,))
    acc.wait(Op("w"), sent)
    acc.launch(Op("add"), torch.Tensor.add_, (value, 1), mutates=(0,))
    acc.end_step()
    acc.close()


@pytest.mark.parametrize("caught_up", [False, True])
def test_nothing_runs_for_the_first_time_at_its_sizes_behind_a_gate(*, caught_up: bool) -> None:
    """The emulated accelerator refuses what would load code where a GPU's driver waits for the gate."""
    acc = EmulatedAccelerator()
    for tokens, again in ((3, False), (3, True), (4, True)):
        acc.begin_step(facts=StepFacts(again=again))
        value = acc.upload(Op("x"), torch.ones(2, WIDTH))
        received = acc.receive(Op("r"), acc.to_host(Op("d"), [value]))
        made = acc.host_ahead(Op("h"), F.linear, (received[0], torch.ones(HOST_ROWS, WIDTH)), {})
        sent = acc.deliver(Op("u"), [made], LIKE)
        keys = acc.upload(Op("k"), torch.ones(tokens, HOST_ROWS))
        (query,) = acc.wait(Op("w"), sent)
        if caught_up:
            acc.caught_up(Op("c"), sent)
        acc.launch(Op("attention"), F.linear, (query, keys))
        if tokens == 3 or caught_up:
            acc.end_step()
        else:
            with pytest.raises(ScheduleError, match="attention runs for the first time at sizes .*4, 16.* gate"):
                acc.end_step()
    acc.close()
