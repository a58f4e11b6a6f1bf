"""Device mirrors of host tensors: uploaded once, and again only when the host's copy has changed.

Whatever the host owns and the accelerator reads (parameters, buffers, caches, inputs of a step) has a
mirror per storage; what is small and new in a step is uploaded for that step only. A mirror is current while storage,
address and version counter are what they were. Tensors made in inference mode have no version: they are compared by
content up to 4 KiB and uploaded afresh above. A mirror dies with its host storage.

Writes that no version shows (``p.data += d``, numpy) are found by fingerprints of the host's bytes: samples of up to
128 tensors that a step uses are compared each step, every eighth a block of one tensor, everything at each compilation
and once one change was found. Of caches, which steps write themselves, the first bytes are compared at the next step.

    mirrors       what a step asks for, and gets; what it returned and wrote
    request       what is asked for
    identity      which host tensor that is, and whether it has changed
    record        what the accelerator holds of one host storage
    records       all of them, who relies on them, and what leaves to make room
    upload        how a tensor that is not there comes up: by itself, as a view of its storage, as rows of a weight
    standing      answers for weights that hold until something changes
    returned      what a step returned, which the next one reads as it is
    settled       answers for what steps write themselves
    fingerprints  what was uploaded, for writes that no version shows
"""

from __future__ import annotations

from hetegen_compile.mirrors.mirrors import Mirrors
from hetegen_compile.mirrors.records import NoRoomError
from hetegen_compile.mirrors.request import MIRRORS, WEIGHTS, Request

__all__ = ["MIRRORS", "WEIGHTS", "Mirrors", "NoRoomError", "Request"]
