"""Autocast regions of a graph, which no cut may go through."""

from __future__ import annotations

from torch import fx

from hetegen_compile.ir import info


def autocast_regions(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """Nodes between ``_enter_autocast`` and its ``_exit_autocast``, both included, of the outermost regions."""
    regions: list[list[fx.Node]] = []
    depth = 0
    for node in nodes:
        name = getattr(node.target, "__name__", "")
        if name == "_enter_autocast":
            depth += 1
            if depth == 1:
                regions.append([])
        if depth:
            regions[-1].append(node)
        depth -= name == "_exit_autocast"
    return regions


def mixed_region(regions: list[list[fx.Node]]) -> str | None:
    """Why an autocast region cannot lie inside one segment, or None."""
    for region in regions:
        odd = next((node for node in region if info(node).random or info(node).data_dependent), None)
        if odd is not None:
            return f"{odd.name} has to run on the host and is inside an autocast region of the forward"
    return None


__all__ = ["autocast_regions", "mixed_region"]
