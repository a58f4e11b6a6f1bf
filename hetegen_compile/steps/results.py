"""What Dynamo reads of a graph's results beside their values, so that the graph that takes them is not compiled again.

- **Which sizes vary.** Dynamo compiles for the sizes that it meets first and learns from the second call which of them
  vary. A cache that grows has another length in each step, so the graph of the first decode step would serve that step
  alone: all planning and compiling for one token. Who makes a tensor may say which of its sizes vary, as AOTAutograd's
  backends do on what their graphs return; a prefill of fixed length says it of the tokens of the caches that it makes.
  Nothing is guarded on that, and it goes no further than the tensor.
- **What is a view.** Of a view Dynamo guards the tensor that it was cut from (``_base``), too. A result that came down
  from the accelerator as a copy has none, and would not pass for the window of a cache that the host cut itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.torch_version import TorchVersion

from hetegen_compile.ir import info, is_tensor
from hetegen_compile.passes.append_tokens import append_tokens
from hetegen_compile.passes.caches import is_new_cache
from hetegen_compile.passes.windows import TOKENS

NOTE = (
    "_dynamo_propagated_dynamic_indices" if TorchVersion(torch.__version__) >= "2.13"
    else "_dynamo_weak_dynamic_indices"
)  # fmt: skip
"""The attribute that Dynamo reads; before torch 2.13 one for backends and users, which it did not guard either."""


@dataclass(frozen=True)
class Results:
    """The results of a captured graph, by position.

    Attributes:
        varying: dimensions that vary although they are numbers in the graph.
        views: those that are views in eager.
    """

    varying: Mapping[int, frozenset[int]]
    views: tuple[int, ...]

    @classmethod
    def of(cls, module: fx.GraphModule, tokens: int) -> Results:
        """From a captured graph that is given ``tokens`` of each sequence (0: their number is not fixed)."""
        results: Any = module.graph.output_node().args[0]
        nodes = {i: node for i, node in enumerate(results) if isinstance(node, fx.Node)}
        values = {i: info(node).value for i, node in nodes.items() if is_tensor(node)}
        caches = {i: value for i, value in values.items() if is_new_cache(value, tokens)}
        return cls(
            varying={i: frozenset({value.dim() + TOKENS}) for i, value in caches.items()},
            views=tuple(i for i, value in values.items() if value._is_view() and nodes[i].target is not append_tokens),
        )

    def as_eager(self, results: Sequence[Any]) -> tuple[Any, ...]:
        """What a step returned, as Dynamo would find it after eager."""
        found = list(results)
        for i in self.views:
            if found[i]._base is None:
                found[i] = found[i].as_strided(found[i].shape, found[i].stride())
        for i, dims in self.varying.items():
            setattr(found[i], NOTE, set(dims))
        return tuple(found)


__all__ = ["NOTE", "Results"]
