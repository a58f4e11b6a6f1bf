"""What is done about each storage that is streamed from: a pure function of what is known about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hetegen_compile.host_memory.limits import Room
from hetegen_compile.host_memory.mappings import Kind
from hetegen_compile.options import format_bytes

RESERVE_BYTES = 256 << 20
"""Memory that adoption leaves free, for activations, compilation and others."""


@dataclass(frozen=True)
class Facts:
    """One storage: its length, what memory it is, and why it cannot be moved ("" if it can)."""

    nbytes: int
    kind: Kind
    immovable: str = ""


@dataclass(frozen=True)
class Decision:
    """``pin`` in place, ``adopt`` into the arena, or ``stage`` through the ring, with the reason for the last."""

    action: Literal["pin", "adopt", "stage"]
    reason: str = ""


def decide(facts: Sequence[Facts], room: Room | None) -> list[Decision]:
    """What to do about storages that are streamed from together.

    File mappings are adopted all or none: what is left on file needs the memory that adoption would take.
    """
    need_bytes = sum(fact.nbytes for fact in facts if fact.kind is Kind.PRIVATE_FILE and not fact.immovable)
    shortage = _shortage(need_bytes, room)
    return [_decide(fact, shortage) for fact in facts]


def _decide(fact: Facts, shortage: str) -> Decision:
    if fact.kind is Kind.SHARED_FILE:
        return Decision("stage", f"lies in {fact.kind.value}, from which a copy would cut it off")
    if fact.kind is not Kind.PRIVATE_FILE:
        return Decision("pin")
    reason = fact.immovable or shortage
    return Decision("stage", f"lies in {fact.kind.value}: {reason}") if reason else Decision("adopt")


def _shortage(need_bytes: int, room: Room | None) -> str:
    if room is None or need_bytes + RESERVE_BYTES <= room.nbytes:
        return ""
    return (
        f"adopting {format_bytes(need_bytes)} of such weights and keeping {format_bytes(RESERVE_BYTES)} free "
        f"exceeds the host memory left, {room}"
    )


def immovable(viewers: Sequence[Tensor]) -> str:
    """Why the tensors that view one storage cannot be moved to another together; "" if they can."""
    if not all(isinstance(tensor, torch.nn.Parameter) for tensor in viewers):
        return "it is not (only) a parameter, so whoever holds it would not see it move"
    if any(tensor.is_inference() for tensor in viewers):
        return "it was made in inference mode, where a tensor's memory cannot be exchanged"
    storage = viewers[0].untyped_storage()
    if torch._C._storage_Use_Count(storage._cdata) > len(viewers) + 1:  # one is ``storage`` itself
        return "it shares its memory with a tensor that is not a parameter of this graph"
    return ""
