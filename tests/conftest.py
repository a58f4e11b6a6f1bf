"""Set before anything imports torch or transformers: one thread, no model hub; and no test is timed."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402
import torch._dynamo.config as dynamo_config  # noqa: E402
import torch._dynamo.guards as guards  # noqa: E402
from hypothesis import settings  # noqa: E402

from hetegen_compile.heap import large_heap  # noqa: E402

torch.set_num_threads(1)

# Dynamo writes no logs that nobody reads: where each side effect came from, and each graph and its guards for
# tlparse, which it does as soon as a logger has handlers, and pytest gives them to each that does not propagate
dynamo_config.side_effect_replay_policy = "silent"
logging.getLogger("torch.__trace").propagate = True

# the same examples each time, as of random models (tests/properties/examples.py); new ones with HETEGEN_EXAMPLES
settings.register_profile("shared machine", deadline=None, derandomize="HETEGEN_EXAMPLES" not in os.environ)
settings.load_profile("shared machine")

# a shell that starts the tests in the background has Ctrl-C ignored, and tests of interrupts need it
signal.signal(signal.SIGINT, signal.default_int_handler)


# what Dynamo measures of each graph's guards, with a flush of all caches, goes into logs that nobody reads
guards.profile_guard_manager = lambda *_: 0.0  # type: ignore[attr-defined]

_heap = contextlib.ExitStack()


def pytest_collection_finish() -> None:
    """Leave half a million objects of imported modules out of collections, and let these be few.

    Tracing makes more objects than planning does, and asking how many are frozen, as each compilation does that is not
    within another, goes through all of them. ``tests/test_heap.py`` has the collector as a program has it.
    """
    gc.collect()
    gc.freeze()
    _heap.enter_context(large_heap())


@pytest.fixture(scope="module", autouse=True)
def _frozen_behind_each_module() -> Iterator[None]:
    """Leave out of collections what a module leaves behind, too: torch keeps captured graphs, millions of objects.

    A fifth of all tests' time was spent in going through them.
    """
    yield
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()
