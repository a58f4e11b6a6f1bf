"""What the two sides of a placed graph cannot share: storages that values alone do not keep in step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import fx

from hetegen_compile.ir import IN_PARTS, INPUT_OPS, info, writers_of
from hetegen_compile.passes.movement import is_view
from hetegen_compile.passes.plans import Placement


def mixed_storage(nodes: Sequence[fx.Node], placement: Placement) -> str | None:
    """Why no transfer of values keeps the sides in step: one writes a storage that the other touches itself.

    Safe are writes that both sides repeat, and writes of one side to a storage that the other knows only
    through values that are moved after them. ``nodes`` are those that compute.
    """
    host, accelerator = placement.host, placement.accelerator
    back = frozenset[int]().union(*(info(node).storages for node in placement.written_back))
    for key, writers in writers_of(nodes).items():
        on_host = [w for w in writers if w in host and w not in accelerator]
        on_accelerator = [w for w in writers if w in accelerator and w not in host]
        if on_host and _touched_on_accelerator(key, nodes, placement):
            return f"{on_host[0].name} writes on the host what the accelerator computes with"
        if on_accelerator and _touched_on_host(key, on_accelerator[0], key in back, placement):
            reader = _name_of(key, nodes, placement)
            return f"{on_accelerator[0].name} writes on the accelerator what {reader} reads on the host"
    return None


def rebound_tensor(nodes: Sequence[fx.Node]) -> str | None:
    """Which of ``nodes`` lets a tensor that is there lie in other memory, which no transfer of values follows."""
    odd = next((node for node in nodes if info(node).rebinds), None)
    if odd is None:
        return None
    return f"{odd.name} gives a tensor that is there other memory ({', '.join(info(odd).aten)})"


def copied_result(results: Sequence[fx.Node], placement: Placement, makers: Mapping[int, fx.Node]) -> str | None:
    """Which result shares memory in eager and would come down as a copy.

    Those that do have to be inputs, or made on the host of inputs or of one download.
    """
    lies_in = Counter(key for node in results for key in info(node).storages)
    for node in results:
        if node in placement.host or node.op in INPUT_OPS:
            continue
        for key in info(node).storages:
            if makers[key].op in INPUT_OPS or (lies_in[key] > 1 and makers[key] is not node):
                return f"{node.name} is computed in memory that it shares with another result or an input"
    return None


def _touched_on_accelerator(key: int, nodes: Sequence[fx.Node], placement: Placement) -> bool:
    """Whether an accelerator node or a Linear reads, writes or makes the storage."""
    return any(
        (node in placement.accelerator or node.target in IN_PARTS) and key in info(node).storages | info(node).reads
        for node in nodes
    )


def _touched_on_host(key: int, writer: fx.Node, is_input: bool, placement: Placement) -> bool:
    """Whether the host has the storage itself and reads it after ``writer``, or made it.

    An input that is copied back is read by the host as it was before the step.
    """
    for node in placement.host:
        if key in info(node).storages - info(node).reads:
            return True
        if is_view(info(node)):
            continue
        own = [arg for arg in node.all_input_nodes if arg in placement.host or arg.op in INPUT_OPS]
        reads = any(key in info(arg).storages for arg in own)
        if reads and (not is_input or info(node).position > info(writer).position):
            return True
    return False


def _name_of(key: int, nodes: Sequence[fx.Node], placement: Placement) -> str:
    """The first host node that knows the storage."""
    touching = (n.name for n in nodes if n in placement.host and key in info(n).reads | info(n).storages)
    return next(touching, "a node")


__all__ = ["mixed_storage"]
