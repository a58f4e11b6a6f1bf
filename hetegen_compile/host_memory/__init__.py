"""Host memory that weights are streamed from: pinned in place, adopted into an arena, or staged through a ring.

    anonymous memory                      pinned in place, by the driver's return code
    private file mapping that fits RAM    copied into one anonymous arena, which is pinned; the mapping is dropped
    anything else                         stays where it is; its rows go through the pinned ring

What will be pinned in place is made huge pages of while the model is compiled (``huge_pages``).
Caches that grow do so where they lie (``growing``).
Nothing is ever held twice: an adopted tensor's pages of the mapping are dropped as its copy is made.
"""

from __future__ import annotations

from hetegen_compile.host_memory.huge_pages import HugePages
from hetegen_compile.host_memory.policy import HostMemory

__all__ = ["HostMemory", "HugePages"]
