"""Host, accelerator or both for everything that is not a Linear.

Why: compute belongs on the accelerator, embedding tables and random numbers on the host. What the caller
gets back lives on the host: a result is either downloaded, or, where it is only moved data (a KV cache's
``cat`` or ``index_copy_``) or integer arithmetic, the node runs on **both** sides and only the values that
feed it cross. So a cache costs the new token's keys and values per step, never the cache.

    keys = cat([past, k])        host: cat([past, download(k)])   accelerator: cat([mirror(past), k])

Which of the two is cheaper is decided by bytes: downloading the node against downloading its leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import fx

from hetegen_compile.ir import IN_PARTS, INPUT_OPS, LINEAR, info, is_tensor, makers_of, writers_of
from hetegen_compile.passes.annotate_costs import value_bytes
from hetegen_compile.passes.append_tokens import COPIED
from hetegen_compile.passes.autocast import autocast_regions, mixed_region
from hetegen_compile.passes.choose_splits import table_only
from hetegen_compile.passes.context import Context, HostOnlyGraphError, Refusal
from hetegen_compile.passes.mixed_storage import copied_result, mixed_storage, rebound_tensor
from hetegen_compile.passes.movement import is_integer, is_view, moves_data
from hetegen_compile.passes.plans import Placement
from hetegen_compile.passes.sources import source_name
from hetegen_compile.passes.tensors import tensors_in
from hetegen_compile.passes.unsplit_weights import computed_on_host


def place_nodes(module: fx.GraphModule, context: Context) -> Placement:
    """Sides of every node that is neither an input, an output nor a Linear.

    Raises:
        HostOnlyGraphError: one side writes a storage that the other touches itself.
    """
    return _Placer(module, context).place()


class _Placer:
    def __init__(self, module: fx.GraphModule, context: Context) -> None:
        self._context = context
        self._nodes = list(module.graph.nodes)
        self._computing = [n for n in self._nodes if n.op not in (*INPUT_OPS, "output")]
        self._writers = writers_of(self._computing)
        self._makers = makers_of(self._nodes)
        self._regions = autocast_regions(self._computing)
        self._in_region = {node for region in self._regions for node in region}
        self._host_only = {node for node in self._computing if self._must_be_host(node)} | self._with_host_weights()
        self._host_only |= {node for node in self._computing if self._takes_item_on_host(node)}
        self._host_only |= self._views_returned()
        self._returned = self._memory_returned()
        self._host: set[fx.Node] = set()
        self._cost: dict[fx.Node, int] = {}

    def place(self) -> Placement:
        written_back = self._place_host()
        accelerator = self._needed_on_accelerator(written_back)
        accelerator |= self._returned_to_accelerator(accelerator)
        placement = Placement(frozenset(self._host), frozenset(accelerator), written_back)
        reasons = (
            rebound_tensor(self._computing), mixed_region(self._regions), mixed_storage(self._computing, placement),
            copied_result(self._nodes[-1].all_input_nodes, placement, self._makers),
        )  # fmt: skip
        for reason in filter(None, reasons):
            raise HostOnlyGraphError(reason)
        self._refuse_copied()
        return placement

    def _refuse_copied(self) -> None:
        for reason in dict.fromkeys(node.meta[COPIED] for node in self._computing if COPIED in node.meta):
            self._context.refuse(Refusal("caches that grow", f"copied in each step: {reason}"))

    # ---- the host's side ---------------------------------------------------------------------------------

    def _must_be_host(self, node: fx.Node) -> bool:
        notes = info(node)
        if node.target == LINEAR or (node in self._in_region and not tensors_in(notes.value)):
            return False
        if notes.random or notes.data_dependent or _is_scalar(node):
            return True
        if "embedding" in notes.aten:
            table = next((arg for arg in node.all_input_nodes if table_only(arg, self._context)), None)
            return table is not None
        return False

    def _takes_item_on_host(self, node: fx.Node) -> bool:
        """Whether the node takes an item of a list of tensors that the host has: lists cross no border."""
        return any(source in self._host_only for source in _lists_read(node))

    def _views_returned(self) -> set[fx.Node]:
        """Views of inputs that nothing is computed with: they are only returned."""
        found: set[fx.Node] = set()
        for node in reversed(self._computing):
            returned = all(user.op == "output" or user in found for user in node.users)
            if node.users and returned and is_view(info(node)) and all(map(self._is_input, info(node).storages)):
                found.add(node)
        return found

    def _memory_returned(self) -> set[fx.Node]:
        """What the caller gets, and where that is a view, what it is a view of."""
        found = set(self._nodes[-1].all_input_nodes)
        for node in reversed(self._computing):
            if node in found and is_view(info(node)):
                found.update(node.all_input_nodes)
        return found

    def _is_input(self, key: int) -> bool:
        """Whether a storage came in."""
        return self._makers[key].op in INPUT_OPS

    def _with_host_weights(self) -> set[fx.Node]:
        """What is computed with weights that cannot be split and that residency left on the host."""
        names = self._context.residency.host_weights if self._context.residency else frozenset()
        return computed_on_host(self._nodes, names, self._context.weights) if names else set()

    def _place_host(self) -> dict[fx.Node, str]:
        """Fill ``self._host``; returns the inputs that have to be copied back whole."""
        for node in self._computing:
            if node in self._host_only:
                self._host.add(node)
                self._bring_to_host(node.all_input_nodes)
        self._bring_outputs_to_host(self._nodes[-1].all_input_nodes)
        return self._place_writes_to_inputs()

    def _place_writes_to_inputs(self) -> dict[fx.Node, str]:
        written_back: dict[fx.Node, str] = {}
        for node in self._nodes:
            keys = info(node).storages if node.op in INPUT_OPS else frozenset()
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

    def _bring_outputs_to_host(self, outputs: list[fx.Node]) -> None:
        """As any other values, but what shares memory in eager shares it here too: views are made on the host."""
        lies_in = Counter(key for node in outputs for key in info(node).storages)
        for node in outputs:
            shared = {key for key in info(node).storages if lies_in[key] > 1}
            if shared and node.op not in INPUT_OPS and self._repeatable(node):
                self._repeat(self._down_to_maker(node, shared))
        self._bring_to_host(outputs)

    def _down_to_maker(self, node: fx.Node, shared: set[int]) -> list[fx.Node]:
        """A view and the views that it is made of; what made the memory comes down, not a part of that."""
        found = [node]
        for one in found:
            found += [
                arg for arg in one.all_input_nodes
                if arg.op not in INPUT_OPS and any(self._makers[key] is not arg for key in info(arg).storages & shared)
            ]  # fmt: skip
        return found

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
        if node in seen or node.op in INPUT_OPS:
            return True
        if node in self._host_only:
            return True
        if node.target in IN_PARTS or node.op not in ("call_function", "call_method"):
            return False
        if not moves_data(node) or not all(self._repeatable(one, seen | {node}) for one in _lists_read(node)):
            return False
        writers = self._writers_touching(node)
        written = {self._makers[key] for writer in writers for key in info(writer).writes if key in self._makers}
        return all(self._repeatable(one, seen | {node}) for one in (*writers, *written))

    def _repeating_is_cheaper(self, node: fx.Node) -> bool:
        if node.op in INPUT_OPS:
            return False
        if _is_scalar(node):
            return True
        if not self._repeatable(node):
            return False
        writers = self._writers_touching(node)
        needs = [*node.all_input_nodes, *writers]
        seen = {node}
        leaves, own = sum(self._leaf_bytes(need, seen) for need in needs), value_bytes(node, self._context)
        if leaves != own or not leaves:
            return leaves <= own
        # a result may be the next step's cache, which each side has then; what is written is not there to be downloaded
        return is_view(info(node)) or node in self._returned or bool(writers)

    def _leaf_bytes(self, node: fx.Node, seen: set[fx.Node]) -> int:
        """Bytes that have to be downloaded so that the host has the node's value."""
        if node in seen or node in self._host or node.op in INPUT_OPS:
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
        roots = [node for node in self._computing if node.target in IN_PARTS]
        roots += [node for node in self._downloads() if node.target not in IN_PARTS]
        roots += [writer for node in written_back for key in info(node).storages for writer in self._writers[key]]
        pending = roots
        while pending:
            node = pending.pop()
            if node in needed or node.op in (*INPUT_OPS, "output"):
                continue
            if node in self._host_only or (_is_scalar(node) and node not in self._in_region):
                continue
            needed.add(node)
            if node in self._in_region:
                pending += next(region for region in self._regions if node in region)
            pending += node.all_input_nodes
            pending += self._writers_touching(node)
        return {node for node in needed if node.target not in IN_PARTS}

    def _returned_to_accelerator(self, accelerator: set[fx.Node]) -> set[fx.Node]:
        """Results that the host moves together and the accelerator can make of values that it has, too.

        They are the next step's inputs, if they are a cache: a window cut from what was concatenated.
        """
        found: set[fx.Node] = set()
        for node in self._nodes[-1].all_input_nodes:
            if node in self._host and not is_integer(node):
                chain = self._chain_from(node, accelerator)
                found |= chain or set()
        return found

    def _chain_from(self, node: fx.Node, accelerator: set[fx.Node]) -> set[fx.Node] | None:
        """The nodes beyond ``accelerator`` that make ``node`` of its values; None if anything else is needed."""
        if node in accelerator or _is_scalar(node):
            return set()
        if node.op in INPUT_OPS:
            return set() if any(user in accelerator for user in node.users) else None
        movable = node not in self._host_only and node.target not in IN_PARTS and self._repeatable(node)
        if not movable or not accelerator.issuperset(self._writers_touching(node)):
            return None
        chain = {node}
        for argument in node.all_input_nodes:
            more = self._chain_from(argument, accelerator)
            if more is None:
                return None
            chain |= more
        return chain

    def _downloads(self) -> list[fx.Node]:
        """Values that a host node or the caller needs and the host does not make itself."""
        readers = [node for node in self._nodes if node in self._host or node.op == "output"]
        inputs = [node for reader in readers for node in reader.all_input_nodes]
        return [n for n in inputs if n not in self._host and n.op not in INPUT_OPS and tensors_in(info(n).value)]


def _lists_read(node: fx.Node) -> list[fx.Node]:
    """Operands that are lists of tensors: they cross no border, only their items do."""
    return [arg for arg in node.all_input_nodes if not is_tensor(arg) and tensors_in(info(arg).value)]


def _is_scalar(node: fx.Node) -> bool:
    """Whether the node makes no tensor and writes none: sizes and arithmetic on them."""
    return not tensors_in(info(node).value) and not info(node).writes


__all__ = ["place_nodes"]
