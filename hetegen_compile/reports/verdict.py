"""What splitting buys on a machine, in one sentence: a plan's seconds against the same work done otherwise."""

from __future__ import annotations

from collections.abc import Mapping

BASELINE_NAMES = {
    "streamed": "all streamed, prefetched",
    "per_module": "module by module, no prefetch",
    "per_linear": "split, each Linear by itself",
    "host_only": "CPU only",
    "resident": "all resident on the accelerator",
}
"""What the baselines are called in reports."""

_NOT_INSTEAD = ("per_linear", "resident")  # a split too; needs more than the budget
_SAME = 0.02  # less than the model's own error: not a difference
_BEST_IS = {
    "streamed": "the host adds nothing to the link here",
    "per_module": "copying module by module is as good here",
    "host_only": "the link adds nothing to the host here",
}


def verdict(ours_s: float, baselines: Mapping[str, float | None]) -> str:
    """One sentence on ``ours_s`` against the baselines that work with the same budget and split nothing."""
    others = {name: s for name, s in baselines.items() if name not in _NOT_INSTEAD and s is not None}
    if not others or ours_s <= 0:
        return "everything fits the budget: there is nothing to split"
    best = min(others, key=others.__getitem__)
    gain = others[best] / ours_s
    if gain >= 1 + _SAME:
        return f"splitting is {gain:.2f} times as fast as the best alternative ({BASELINE_NAMES[best]})"
    if gain > 1 - _SAME:
        return f"splitting buys nothing: {_BEST_IS[best]} ({BASELINE_NAMES[best]} is as fast)"
    return f"splitting loses: {BASELINE_NAMES[best]} is {1 / gain:.2f} times as fast"
