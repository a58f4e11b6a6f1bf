"""Fingerprints of host memory: what was uploaded, so that writes which no version counter shows are noticed.

``p.data += d``, numpy views and fused optimisers change a tensor and leave ``_version`` as it was. A fingerprint is
taken when a tensor is uploaded and compared with the host's bytes later; the device is not asked. It has two
parts: some samples of 16 bytes, each compared in a fraction of a microsecond, for changes of a whole tensor; and
the sum of every block of 4 KiB, for changes of a part. Words that are exchanged within one block are not seen.
"""

from __future__ import annotations

import ctypes
import random

import torch
from torch import Tensor

SAMPLE_BYTES = 16
SAMPLES = 16
QUICK_SAMPLES = 4
BLOCK_BYTES = 4096
_WORD = 8


class Fingerprint:
    """What ``nbytes`` from ``start`` in a storage were when it was made.

    Every method is given the address or the storage itself, which has to be the one that it was made of.
    ``turns`` is after how many turns the samples repeat.
    """

    turns = SAMPLES

    def __init__(self, storage: torch.UntypedStorage, start: int, nbytes: int) -> None:
        self._start = start
        self._nbytes = nbytes
        address = storage.data_ptr()
        self._samples = [(offset, _bytes_at(address + offset, n)) for offset, n in _places(start, nbytes)]
        self._sums = self._block_sums(storage) if len(self._samples) > 1 else None

    def sample(self, address: int, turn: int) -> tuple[ctypes.Array[ctypes.c_char], bytes]:
        """The memory of one sample, another one each turn, and what it was; ``address`` is the storage's."""
        offset, expected = self._samples[turn % len(self._samples)]
        return (ctypes.c_char * len(expected)).from_address(address + offset), expected

    def sample_matches(self, address: int, turn: int) -> bool:
        """Whether one sample, another one each turn, is what it was; ``address`` is the storage's."""
        place, expected = self.sample(address, turn)
        return place.raw == expected

    def block_matches(self, address: int, turn: int) -> bool:
        """Whether one block, another one each turn, is what it was."""
        if self._sums is None:
            return self.sample_matches(address, turn)
        block = turn % len(self._sums)
        lo, hi = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self._nbytes)
        data = _bytes_at(address + self._start + lo, hi - lo)
        return _sum_of(data, self._in_words(hi - lo)) == int(self._sums[block])

    def matches(self, storage: torch.UntypedStorage) -> bool:
        """Whether all bytes are what they were."""
        if self._sums is None:
            return self.sample_matches(storage.data_ptr(), 0)
        return torch.equal(self._block_sums(storage), self._sums)

    def _block_sums(self, storage: torch.UntypedStorage) -> Tensor:
        data = torch.empty(0, dtype=torch.uint8).set_(storage, self._start, (self._nbytes,))  # type: ignore[call-overload]
        whole = self._nbytes // BLOCK_BYTES * BLOCK_BYTES
        parts = [part for part in (data[:whole].view(-1, BLOCK_BYTES), data[whole:].view(1, -1)) if part.numel()]
        return torch.cat([self._sum_rows(part) for part in parts])

    def _sum_rows(self, rows: Tensor) -> Tensor:
        if self._in_words(rows.shape[1]):
            return rows.view(torch.int64).sum(1)
        return rows.sum(1, dtype=torch.int64)

    def _in_words(self, nbytes: int) -> bool:
        """Whether a block is summed as words of 8 bytes, wrapping around; else as bytes."""
        return self._start % _WORD == 0 and nbytes % _WORD == 0


class EarlierSample(Fingerprint):
    """Of the first bytes of a storage, at most one sample, that were read before."""

    def __init__(self, expected: bytes) -> None:
        self._start, self._nbytes = 0, len(expected)
        self._samples, self._sums = [(0, expected)], None


def sampled(address: int, nbytes: int) -> tuple[bytes, ...]:
    """A few bytes of host memory, evenly apart: what shows at once that all of it was changed."""
    length = min(SAMPLE_BYTES, nbytes)
    apart = (nbytes - length) / (QUICK_SAMPLES - 1)
    return tuple(_bytes_at(address + int(i * apart), length) for i in range(QUICK_SAMPLES))


def _places(start: int, nbytes: int) -> list[tuple[int, int]]:
    """Offset in the storage and length of each sample: evenly apart, but at no fixed column of a matrix."""
    if nbytes <= SAMPLE_BYTES * SAMPLES:
        return [(start, nbytes)]
    random_ = random.Random(nbytes)
    part = nbytes // SAMPLES
    return [(start + i * part + random_.randrange(part - SAMPLE_BYTES + 1), SAMPLE_BYTES) for i in range(SAMPLES)]


def _bytes_at(address: int, nbytes: int) -> bytes:
    return ctypes.string_at(address, nbytes)


def _sum_of(data: bytes, in_words: bool) -> int:
    """What summing the block as one of many gives; words wrap around as torch's do."""
    if not in_words:
        return sum(data)
    return (sum(memoryview(data).cast("q")) + (1 << 63)) % (1 << 64) - (1 << 63)


__all__ = ["EarlierSample", "Fingerprint", "sampled"]
