"""What makes a step that failed half-way safe to run again: the host's inputs are as if it had not run.

A step writes inputs in place on the host (a static cache's new keys, its counter). Running it again is safe where
each such storage is written once, by an operation that only overwrites (``index_copy_``), and not read before:
the second run writes the same values to the same place and nobody saw the first. Small storages that are written
otherwise (a counter's ``add_``) are copied before the step and put back; a large one that is (a sliding cache's
roll) forbids the second run once its write has begun.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hetegen_compile.ir import info

COPIED_BYTES = 64 << 10
"""Storages up to this size are copied before a step that writes them otherwise than by overwriting."""

_OVERWRITES = frozenset({"index_copy_", "copy_", "fill_", "zero_"})
_VIEWS = frozenset({"slice", "select", "view", "as_strided", "alias", "detach", "unsqueeze", "squeeze", "transpose"})


@dataclass(frozen=True)
class HostWrites:
    """Positions of the inputs that a step writes on the host in a way that a second run would not repeat.

    ``random`` says that the step draws random numbers on the host.
    """

    inputs: tuple[int, ...]
    random: bool


def host_writes(graph: fx.Graph) -> HostWrites:
    """Which inputs that a captured graph writes need care before a step of it may run twice."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    written = {key for node in nodes for key in info(node).writes}
    fragile = {key for key in written if not _repeats(key, nodes)}
    placeholders = graph.find_nodes(op="placeholder")
    return HostWrites(
        tuple(i for i, node in enumerate(placeholders) if info(node).storages & fragile),
        any(info(node).random for node in nodes),
    )


def _repeats(key: int, nodes: Sequence[fx.Node]) -> bool:
    """Whether a second run leaves the storage as the first would have: overwritten once, read only afterwards."""
    touching = [node for node in nodes if key in info(node).writes or _reads(key, node)]
    writers = [node for node in nodes if key in info(node).writes]
    return len(writers) == 1 and touching[0] is writers[0] and _overwrites(writers[0])


def _overwrites(node: fx.Node) -> bool:
    known = _OVERWRITES | ({"index_put_"} if node.target is operator.setitem else set())
    return set(info(node).aten) <= known | _VIEWS


def _reads(key: int, node: fx.Node) -> bool:
    """Whether a node reads the storage's contents: one that only makes another view of it does not."""
    touches = key in info(node).reads or any(key in info(operand).storages for operand in node.all_input_nodes)
    return touches and key not in info(node).storages


class Undo:
    """Taken before a step; ``restore`` after it failed."""

    def __init__(self, writes: HostWrites, inputs: Sequence[Any]) -> None:
        care = [inputs[i] for i in writes.inputs]
        self._copies = [(tensor, tensor.detach().clone()) for tensor in care if tensor.nbytes <= COPIED_BYTES]
        self._large = [(tensor, _version(tensor)) for tensor in care if tensor.nbytes > COPIED_BYTES]
        self._random = torch.get_rng_state() if writes.random else None

    def restore(self) -> bool:
        """Put the copies back; False if a storage that has none was written: the step must not run again."""
        if any(before is None or _version(tensor) != before for tensor, before in self._large):
            return False
        for tensor, copy in self._copies:
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(copy)
        if self._random is not None:
            torch.set_rng_state(self._random)
        return True


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


__all__ = ["HostWrites", "Undo", "host_writes"]
