"""One life cycle from its seed.

``python -m benchmarks.cycles.one '{"seed": 1, "name": "llama", "kind": "causal", "keep": null}' notes.json`` is what
``benchmarks.cycles`` runs for each. Every action draws from generators of its own (seed and position), so an action
that is left out changes no choice of the others.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
import transformers

from benchmarks.children import Notebook, child_main
from benchmarks.cycles import changes, conversation, generation
from benchmarks.cycles.state import Cycle, Pair
from benchmarks.cycles.watch import Failure
from hetegen_compile.runtime import live_runtimes

Action = Callable[[Cycle, Pair, Random], None]

FORWARDS: dict[Action, int] = {generation.forward: 2}
GENERATIONS: dict[Action, int] = {generation.generate: 6}
TURNS: dict[Action, int] = {conversation.conversation: 4, conversation.by_hand: 2}
CHANGES: dict[Action, int] = {
    changes.write: 3, changes.tie: 1, changes.to_dtype: 1, changes.copied: 1, changes.compiled_again: 2,
    changes.dynamo_reset: 1, changes.another_beside: 2, generation.trained: 1, generation.interrupted: 1,
    generation.in_threads: 1,
}  # fmt: skip
"""Actions and how often each is chosen."""
INDUCTOR_SHARE = 0.1


def actions_for(kind: str) -> dict[Action, int]:
    """What can be done to a model of this kind."""
    if kind == "masked":
        return FORWARDS | CHANGES
    turns = {"causal": TURNS, "vision": {}}.get(kind, {conversation.conversation: 3})
    return FORWARDS | GENERATIONS | turns | CHANGES


def run_cycle(seed: int, name: str, kind: str, keep: Sequence[int] | None = None) -> dict[str, Any]:
    """A cycle's report: its status, why, the story, counts.

    The status is ``equal``, ``not built``, ``eager fails`` (whatever was tried), ``nothing compiled`` (the model's own
    ``generate`` calls parts of it, or the host computes everything) or ``FAILED``.
    ``keep``: positions of the actions that are done, in this order.
    """
    rng = Random(seed)
    cycle = Cycle(seed, rng.random() < INDUCTOR_SHARE)
    positions = range(rng.randint(3, 7)) if keep is None else keep
    with cycle.watch.listening():
        try:
            cycle.add(name, kind, rng)
        except Exception as error:
            return _report(cycle, "not built", f"{type(error).__name__}: {error}")
        try:
            for position in positions:
                _act(cycle, kind, position)
            _check_offloaded(cycle)
            _check_nothing_left(cycle)
        except Exception as error:
            return _report(cycle, "FAILED", _told(error))
    if not cycle.compared:
        return _report(cycle, "eager fails", "")
    return _report(cycle, "equal" if cycle.watch.steps else "nothing compiled", "")


def _act(cycle: Cycle, kind: str, position: int) -> None:
    rng = Random(f"{cycle.seed}/{position}")
    weights = actions_for(kind)
    first = generation.forward if kind == "masked" else generation.generate
    action = first if position == 0 else rng.choices(list(weights), list(weights.values()))[0]
    pair = cycle.pairs[0] if position == 0 else rng.choice(cycle.pairs)
    cycle.say(f"{position}: {action.__name__} {pair.name}")
    action(cycle, pair, Random(f"{cycle.seed}/{position}/draws"))
    del pair  # it may have been deleted in the action; compiled models refer to themselves
    gc.collect()


def _check_offloaded(cycle: Cycle) -> None:
    """With less room than weights some are computed on the host or streamed."""
    steps, smallest = cycle.watch.steps, min(pair.weight_bytes for pair in cycle.pairs)
    tight = [step.schedule for step in steps if step.schedule.budget_bytes < smallest]
    if tight and not any(schedule.host_bytes + schedule.streamed_bytes for schedule in tight):
        raise Failure("less room than weights, and nothing was split or streamed")


def _check_nothing_left(cycle: Cycle) -> None:
    counters = [runtime.accelerator.counters for runtime in live_runtimes()]
    cycle.pairs.clear()
    torch._dynamo.reset()
    gc.collect()
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("hetegen")]
    held, runtimes = [sum(each.held_bytes.values()) for each in counters], len(live_runtimes())
    if threads or any(held) or runtimes:
        raise Failure(f"left behind: threads {threads}, {held} bytes, {runtimes} runtimes")


def _told(error: Exception) -> str:
    if isinstance(error, Failure):
        return str(error)
    return f"{type(error).__name__}: {error}\n" + "".join(traceback.format_tb(error.__traceback__)[-8:])


def _report(cycle: Cycle, status: str, detail: str) -> dict[str, Any]:
    cycle.pairs.clear()
    return {
        "status": status, "detail": detail[:4000], "compared": cycle.compared, "graphs": cycle.graphs,
        "refusals": cycle.refusals, "steps": len(cycle.watch.steps), "inductor": cycle.inductor,
        "warnings": list(dict.fromkeys(text[:200] for text in cycle.watch.warnings))[:6], "story": cycle.story,
    }  # fmt: skip


def quiet() -> None:
    """One thread, and nothing printed but what is asked for."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)


def _work(argument: dict[str, Any], notebook: Notebook) -> None:
    quiet()
    notebook.note("report", run_cycle(**argument))


if __name__ == "__main__":
    sys.exit(child_main(_work))
