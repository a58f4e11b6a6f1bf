"""Host, accelerator or both for everything that is not a Linear.

Why: compute belongs on the accelerator, embedding tables and random numbers on the host. What the caller
gets back lives on the host: a result is either downloaded, or, where it is only moved data (a KV cache's
``cat`` or ``index_copy_``) or integer arithmetic, the node runs on **both** sides and only the values that
feed it cross. So a cache costs the new token's keys and values per step, never the cache.

    keys = cat([past, k])        host: cat([past, download(k)])   accelerator: cat([mirror(past), k])

Which of the two is cheaper is decided by bytes: downloading the node against downloading its leaves.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from hetegen_compile.ir import LINEAR, info
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.capture import source_name, tensors_in
from hetegen_compile.passes.choose_splits import table_only
from hetegen_compile.passes.context import Context, Placement, Refusal

MOVEMENT = frozenset(
    """_to_copy _unsafe_view alias arange as_strided cat clone constant_pad_nd copy_ copy detach empty
    empty_like empty_strided expand eye fill fill_ flip full full_like gather index index_copy index_copy_
    index_put index_put_ index_select lift_fresh lift_fresh_copy masked_fill masked_fill_ narrow new_empty
    new_full new_ones new_zeros ones ones_like permute repeat roll scalar_tensor scatter scatter_ select
    select_scatter slice slice_scatter split split_with_sizes squeeze stack t transpose tril tril_ triu triu_
    unbind unfold unsqueeze view where zero_ zeros zeros_like _local_scalar_dense""".split()
)


def place_nodes(module: fx.GraphModule, context: Context) -> Placement:
    """Sides of every node that is neither an input, an output nor a Linear."""
    return _Placer(module, context).place()


class _Placer:
    def __init__(self, module: fx.GraphModule, context: Context) -> None:
        self._context = context
        self._nodes = list(module.graph.nodes)
        self._computing = [n for n in self._nodes if n.op not in ("placeholder", "get_attr", "output")]
        self._writers: dict[int, list[fx.Node]] = {}
        for node in self._computing:
            for key in info(node).writes:
                self._writers.setdefault(key, []).append(node)
        self._host_only = {node for node in self._computing if self._must_be_host(node)}
        self._host: set[fx.Node] = set()
        self._cost: dict[fx.Node, int] = {}

    def place(self) -> Placement:
        written_back = self._place_host()
        accelerator = self._needed_on_accelerator(written_back)
        return Placement(frozenset(self._host), frozenset(accelerator), written_back)

    # ---- the host's side ---------------------------------------------------------------------------------

    def _must_be_host(self, node: fx.Node) -> bool:
        notes = info(node)
        if node.target == LINEAR:
            return False
        if notes.random or notes.data_dependent or _is_scalar(node):
            return True
        if "embedding" in notes.aten:
            table = next((arg for arg in node.all_input_nodes if table_only(arg, self._context)), None)
            return table is not None
        return False

    def _place_host(self) -> dict[fx.Node, str]:
        """Fill ``self._host``; returns the inputs that have to be copied back whole."""
        for node in self._computing:
            if node in self._host_only:
                self._host.add(node)
                self._bring_to_host(node.all_input_nodes)
        self._bring_to_host(self._nodes[-1].all_input_nodes)
        return self._place_writes_to_inputs()

    def _place_writes_to_inputs(self) -> dict[fx.Node, str]:
        written_back: dict[fx.Node, str] = {}
        for node in self._nodes:
            keys = info(node).storages if node.op in ("placeholder", "get_attr") else frozenset()
            writers = [writer for key in keys for writer in self._writers.get(key, ())]
            if not writers:
                continue
            odd = next((writer for writer in writers if not self._repeatable(writer)), None)
            if odd is None:
                self._repeat(writers)
            else:
                reason = f"{odd.name} writes it with {', '.join(info(odd).aten)}, which is computed"
                written_back[node] = reason
                where = source_name(node) or node.name
                self._context.refuse(Refusal(where, f"copied back whole after each step: {reason}"))
        return written_back

    def _bring_to_host(self, nodes: Iterable[fx.Node]) -> None:
        """Decide for each value that the host needs between repeating the node and downloading it."""
        for node in nodes:
            if node not in self._host and self._repeating_is_cheaper(node):
                self._repeat([node])

    def _repeat(self, nodes: Iterable[fx.Node]) -> None:
        """Run ``nodes`` on the host, with all writers of the storages that they touch."""
        for node in nodes:
            if node in self._host:
                continue
            self._host.add(node)
            self._repeat(self._writers_touching(node))
            self._bring_to_host(node.all_input_nodes)

    def _writers_touching(self, node: fx.Node) -> list[fx.Node]:
        keys = info(node).storages | info(node).reads
        return [writer for key in keys for writer in self._writers.get(key, ())]

    def _repeatable(self, node: fx.Node, seen: frozenset[fx.Node] = frozenset()) -> bool:
        """Whether the host may run the node too: moved data or integer arithmetic, and so its writers."""
        if node in seen or node.op in ("placeholder", "get_attr"):
            return True
        if node in self._host_only:
            return True
        if node.target == LINEAR or node.op not in ("call_function", "call_method"):
            return False
        moves = all(name in MOVEMENT for name in info(node).aten)
        if not moves and not _is_integer(node):
            return False
        return all(self._repeatable(writer, seen | {node}) for writer in self._writers_touching(node))

    def _repeating_is_cheaper(self, node: fx.Node) -> bool:
        if node.op in ("placeholder", "get_attr"):
            return False
        if _is_scalar(node):
            return True
        if not self._repeatable(node):
            return False
        return self._leaf_bytes(node, set()) <= value_bytes(node, self._context)

    def _leaf_bytes(self, node: fx.Node, seen: set[fx.Node]) -> int:
        """Bytes that have to be downloaded so that the host has the node's value."""
        if node in seen or node in self._host or node.op in ("placeholder", "get_attr"):
            return 0
        seen.add(node)
        if not self._repeatable(node):
            return value_bytes(node, self._context)
        needs = [*node.all_input_nodes, *self._writers_touching(node)]
        leaves = sum(self._leaf_bytes(need, seen) for need in needs)
        return leaves if self._writers_touching(node) else min(leaves, value_bytes(node, self._context))

    # ---- the accelerator's side ----------------------------------------------------------------------------

    def _needed_on_accelerator(self, written_back: dict[fx.Node, str]) -> set[fx.Node]:
        """Nodes whose value a Linear, a download or the mirror of a written input depends on."""
        needed: set[fx.Node] = set()
        roots = [node for node in self._computing if node.target == LINEAR]
        roots += [node for node in self._downloads() if node.target != LINEAR]
        roots += [writer for node in written_back for key in info(node).storages for writer in self._writers[key]]
        pending = roots
        while pending:
            node = pending.pop()
            if node in needed or node.op in ("placeholder", "get_attr", "output"):
                continue
            if node in self._host_only or _is_scalar(node):
                continue
            needed.add(node)
            pending += node.all_input_nodes
            pending += self._writers_touching(node)
        return {node for node in needed if node.target != LINEAR}

    def _downloads(self) -> list[fx.Node]:
        """Values that a host node or the caller needs and the host does not make itself."""
        readers = [node for node in self._nodes if node in self._host or node.op == "output"]
        inputs = [node for reader in readers for node in reader.all_input_nodes]
        made = ("placeholder", "get_attr")
        return [n for n in inputs if n not in self._host and n.op not in made and tensors_in(info(n).value)]


def _is_scalar(node: fx.Node) -> bool:
    """Whether the node makes no tensor and writes none: sizes and arithmetic on them."""
    return not tensors_in(info(node).value) and not info(node).writes


def _is_integer(node: fx.Node) -> bool:
    """Whether all tensors that the node reads and makes hold integers or booleans."""
    tensors = tensors_in([info(node).value, *(info(arg).value for arg in node.all_input_nodes)])
    return all(not t.dtype.is_floating_point and not t.dtype.is_complex for t in tensors)


__all__ = ["MOVEMENT", "place_nodes"]
