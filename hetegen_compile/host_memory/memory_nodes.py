"""Memory of machines with several NUMA nodes: pages that are written next are spread over them in turn.

Linux puts a page on the node of the thread that touches it first. Weights that one thread copies would all lie on its
node, and the host Linears of the threads on the other nodes would read them from there: one node's memory rate for all.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Sequence

logger = logging.getLogger("hetegen_compile")

_MBIND = {"x86_64": 237, "aarch64": 235}
"""Number of Linux' system call ``mbind`` by machine; libc has no function for it."""
_INTERLEAVE = 3
"""``MPOL_INTERLEAVE``."""
_WORD_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


def interleave(address: int, nbytes: int, nodes: Sequence[int]) -> bool:
    """Spread the pages of a range over memory nodes, those that are not there yet; whether the system does it.

    ``address`` is the start of a page. Nothing is asked for where there is only one node to choose. A refusal (a
    container may forbid the call) is logged: the pages then lie where they are first written.
    """
    call = _MBIND.get(platform.machine())
    if len(nodes) < 2 or call is None:
        return False
    words = (ctypes.c_ulong * (max(nodes) // _WORD_BITS + 1))()
    for node in nodes:
        words[node // _WORD_BITS] |= 1 << node % _WORD_BITS
    libc = ctypes.CDLL(None, use_errno=True)
    longest = ctypes.c_ulong(len(words) * _WORD_BITS + 1)  # the kernel reads one bit less
    size, policy, flags = ctypes.c_ulong(nbytes), ctypes.c_int(_INTERLEAVE), ctypes.c_uint(0)
    code = libc.syscall(ctypes.c_long(call), ctypes.c_void_p(address), size, policy, words, longest, flags)
    if code != 0:
        reason = os.strerror(ctypes.get_errno())
        logger.warning("weights are not spread over memory nodes %s: mbind says %s", list(nodes), reason)
    return bool(code == 0)


__all__ = ["interleave"]
