"""What the verifier says is wrong: the node, what it does, and the edge that is missing."""

from __future__ import annotations

from torch import fx

from hetegen_compile.errors import MissingWaitError, ScheduleError
from hetegen_compile.ir import Side
from hetegen_compile.passes.happens_before import OPERATIONS, name_of, short


def fault(node: fx.Node, what: str, edge: str) -> ScheduleError:
    """``node`` does ``what``, and ``edge`` would have made it right."""
    return ScheduleError(f"verify: {name_of(node)} {what}; missing edge: {edge}")


def elsewhere(user: fx.Node, operand: fx.Node, side: Side, there: Side) -> MissingWaitError:
    """``user`` reads on ``side`` what lies on the other."""
    return MissingWaitError(
        f"verify: {name_of(user)} reads {name_of(operand)} on the {side}, but it is on the {there}; "
        f"missing edge: a transfer of {operand} and its wait -> {user}"
    )


def not_waited_for(user: fx.Node, transfer: fx.Node) -> MissingWaitError:
    """``user`` takes a transfer for a value."""
    waits = [short(target) for target in OPERATIONS[transfer.target].ended_by[:1]]
    return MissingWaitError(
        f"verify: {name_of(user)} uses {name_of(transfer)} without a wait in between; "
        f"missing edge: {(waits or ['wait'])[0]}({transfer}) -> {user}"
    )
