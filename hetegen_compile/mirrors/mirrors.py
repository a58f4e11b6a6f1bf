"""All mirrors on one accelerator: what a step asks for and gets, what it returned and what it wrote."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hetegen_compile.accelerators.base import Accelerator, Value
from hetegen_compile.accelerators.growing import block_of, token_bytes
from hetegen_compile.geometry import storage_id
from hetegen_compile.mirrors.fingerprints import Fingerprint
from hetegen_compile.mirrors.identity import Geometry, covers_storage, geometry_of
from hetegen_compile.mirrors.record import Held, Memory, Record, Shared
from hetegen_compile.mirrors.records import UNSEEN_WRITE, NoRoomError, Records
from hetegen_compile.mirrors.request import MIRRORS, WEIGHTS, Request
from hetegen_compile.mirrors.returned import RETURNED
from hetegen_compile.mirrors.settled import Settled
from hetegen_compile.mirrors.standing import Samples, Standing
from hetegen_compile.mirrors.upload import Uploader, first_bytes, new_bytes
from hetegen_compile.passes.claims import WeightKey

logger = logging.getLogger("hetegen_compile")


class Mirrors:
    """Not thread-safe: used under the accelerator's step lock."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._uploader = Uploader(accelerator)
        self._records = Records()
        self._step = 0
        self._random = random.Random(0)
        self.keep: frozenset[int] = frozenset()
        """Storages with weights that are resident by plan: only ``forget_weights`` drops those."""

    # ---- a step ----------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Forget the mirrors of storages that no longer exist; what is fetched from now on is in use."""
        self._step += 1
        self.purge()

    def fetch(self, requests: Sequence[Request], limit_bytes: int) -> list[Value]:
        """Device values with the contents and geometry of host tensors; uploads only what is not current.

        A view under the category ``mirrors`` may be a device view of the mirrored storage, so that views alias
        each other as on the host; under any other category exactly the tensor's own bytes are uploaded. Before
        an upload, mirrors that this step does not use are dropped until all fit ``limit_bytes``.

        Raises:
            NoRoomError: what this step uses does not fit.
        """
        found = [self._lookup(request) for request in requests]
        if not Samples(_watched(found), self._random.getrandbits(32)).match():  # made anew: look anywhere
            self.check()
            found = [self._lookup(request) for request in requests]
        missing = [i for i, (record, geometry) in enumerate(found) if geometry not in record.held]
        added = new_bytes([(found[i][0], requests[i]) for i in missing]) if missing else 0
        self.fit(limit_bytes - added)
        self._records.most_bytes += added
        for i in missing:
            record, geometry = found[i]
            if geometry not in record.held:  # the same tensor may be asked for twice
                record.held[geometry] = self._uploader.make(record, requests[i], self._step)
        return [record.held[geometry].value for record, geometry in found]

    def knows(self, tensor: Tensor) -> bool:
        """Whether anything is noted of the tensor's storage."""
        return self._records.has(storage_id(tensor))

    def upload_once(self, request: Request, limit_bytes: int) -> Value:
        """The value of a tensor for this step only: nothing is noted, and there has to be room.

        Where something has been noted of its storage meanwhile, by another view of it, it is fetched.
        """
        return self.fetch([request], limit_bytes)[0] if self.knows(request.tensor) else self._uploader.upload(request)

    def _lookup(self, request: Request) -> tuple[Record, Geometry]:
        geometry = geometry_of(request.tensor)
        record = self._records.current(request.tensor, geometry)
        record.used = self._step
        if request.whole and record.base is None and record.held:
            self._records.changed(record)
            record.empty()  # values that do not share memory
        for held in _parts(record, geometry, request):
            held.used = self._step
        return record, geometry

    def register(self, tensor: Tensor, value: Value, category: str = MIRRORS) -> None:
        """Make ``value`` the mirror of a host tensor that a step just returned with the same contents.

        Later views of a tensor that is all of its storage (a cache that was cropped) are views of ``value``. A
        tensor that is a part (a sliding window of what was concatenated) is mirrored by itself; of several parts of one
        storage (keys and values of one packed projection) those whose values share memory count it once.
        """
        if tensor.numel() == 0:
            return
        block = block_of(value)
        if category == MIRRORS and self._records.note_returned(tensor, value, self._step, block):
            return
        record, storage_bytes = self._record_of(tensor), int(tensor.untyped_storage().nbytes())
        if covers_storage(tensor) and record.base is None:
            self._records.most_bytes += storage_bytes if block is None else block.nbytes
            record.hold(value, tensor.nbytes, block)
            held = Held(value, category, 0)
        else:  # the value keeps its storage, as the tensor does
            laid_out = self._uploader.laid_out_as(tensor, value, category)
            memory = self._memory_of(laid_out, record)
            self._records.most_bytes += storage_bytes if memory is None else 0
            held = Held(laid_out, category, storage_bytes if memory is None else 0, memory=memory)
        held = replace(held, name=RETURNED, fingerprint=first_bytes(tensor), used=self._step)
        record.held[geometry_of(tensor)] = held

    def _memory_of(self, value: Value, record: Record) -> Memory | None:
        """What a value shares with one that this step returned of the same storage; None: it has memory of its own."""
        if record.block is not None and self._uploader.share_memory(value, record.base):
            return record.block
        for other in record.held.values():
            if other.apart and self._uploader.share_memory(value, other.value):
                if other.memory is None:
                    other.memory, other.nbytes = Shared(other.nbytes), 0
                return other.memory
        return None

    def _record_of(self, tensor: Tensor) -> Record:
        """The record of a storage that this step made: a new one, unless another view of it was returned, too."""
        record = self._records.of_step(storage_id(tensor), self._step) or self._records.renew(tensor)
        record.returned = record.used = self._step
        return record

    def give_room(self, request: Request, value: Value, tokens: int, limit_bytes: int) -> Value:
        """The value of a cache that is fetched for this step, moved into memory with room for ``tokens`` tokens.

        Raises:
            NoRoomError: with it, what this step uses does not fit ``limit_bytes``.
        """
        tensor = request.tensor
        self.fit(limit_bytes - max(tokens, tensor.shape[-2]) * token_bytes(tensor))
        moved, block = self._uploader.move(request, value, tokens)
        geometry, first = geometry_of(tensor), first_bytes(tensor)
        held = Held(moved, request.category, 0, request.name, first, self._step)
        record = self._records.get(storage_id(tensor))
        assert record is not None, "it was fetched in this step"
        self._records.move(record, geometry, held, block, self._step, whole=covers_storage(tensor))
        return moved

    def separate(self, tensors: Sequence[Tensor]) -> None:
        """The step writes these: drop those that lie in one block with other caches, to lie by themselves."""
        for key in map(storage_id, tensors):
            record = self._records.get(key)
            if record is not None and any(self._records.share(memory, key) for memory in record.memories):
                self._records.drop(key)

    def fit(self, limit_bytes: int) -> None:
        """Drop what this step does not use until all fit ``limit_bytes``.

        Raises:
            NoRoomError: what it uses does not. All that has been issued is over then: the mirrors stay, and what an
                aborted step passes over would be missing.
        """
        if self._records.most_bytes > limit_bytes:
            try:
                self._records.make_room(limit_bytes, self._step, self.keep)
            except NoRoomError:
                self._uploader.finish()
                raise

    def returned(self, tensors: Sequence[Tensor]) -> list[Value | None]:
        """Values of tensors that a step returned, as it returned them; None for all others, to be fetched."""
        return [self._records.answer(tensor, self._step) for tensor in tensors]

    def settle(self, tensors: Sequence[Tensor], before: Settled | None = None) -> Settled | None:
        """The step wrote the host tensors and their mirrors alike: what the mirrors hold is current again.

        ``before`` is what the last step that wrote all of them was answered with; the result is for the next one, None
        where there can be none.
        """
        if before is not None and before.valid and before.used == self._step:
            self._records.wrote_again(before, tensors)
            return before
        for tensor in tensors:
            self._records.settle(tensor)
        return self._stand_settled(tensors)

    def _stand_settled(self, tensors: Sequence[Tensor]) -> Settled | None:
        if not tensors or any(tensor.is_inference() for tensor in tensors):
            return None
        found = []
        for tensor in tensors:
            record = self._records.get(storage_id(tensor))
            held = None if record is None else record.held.get(geometry_of(tensor))
            if record is None or held is None or record.memories:  # another cache may come to lie there, and no record
                return None  # changes by that: what is written has to be looked at each time
            found.append((record, [held]))
        settled = Settled(tensors, [held.value for _, (held,) in found])
        self._records.stand(settled, found)
        return settled

    # ---- standing answers ------------------------------------------------------------------------------------

    def stand(self, tensors: Sequence[Tensor], requests: Sequence[Request]) -> Standing | None:
        """Keep what was just fetched for ``requests``, which are made of ``tensors``, as a standing answer.

        None for tensors that were made in inference mode: nothing tells whether they have changed.
        """
        if any(tensor.is_inference() for tensor in tensors):
            return None
        found = [self._lookup(request) for request in requests]
        values = [record.held[geometry].value for record, geometry in found]
        standing = Standing(tensors, values, Samples(_watched(found)))
        pairs = zip(found, requests, strict=True)
        self._records.stand(standing, [(record, _parts(record, where, one)) for (record, where), one in pairs])
        return standing

    def stands(self, standing: Standing, tensors: Sequence[Tensor]) -> bool:
        """Whether a standing answer is right for these tensors in this step; if so it counts as used."""
        if not standing.holds_for(tensors):
            return False
        if not standing.samples.match():
            self.check()
            return False
        standing.used = self._step
        return True

    # ---- between steps ---------------------------------------------------------------------------------------

    def make_room(self, limit_bytes: int) -> None:
        """Drop mirrors that are not resident by plan until all fit ``limit_bytes``; no step is under way.

        Raises:
            NoRoomError: what is resident by plan does not fit.
        """
        self._records.make_room(limit_bytes, self._step + 1, self.keep)

    # ---- what is out of date ---------------------------------------------------------------------------------

    def check(self, known: Iterable[Tensor] = ()) -> None:
        """Compare all fingerprints with the host's bytes; what was changed unseen is uploaded at its next use.

        A change that a version shows, of the tensors ``known`` or of those that others have, is none of these: nobody
        has asked for the tensor since.
        """
        self._records.up_to_date()
        for tensor in known:
            if self._records.get(storage_id(tensor)) is not None:
                self._records.current(tensor, geometry_of(tensor))
        for key, record in self._records:
            storage = torch.UntypedStorage._new_with_weak_ptr(record.storage.cdata)
            if storage is None or storage.data_ptr() != record.address:
                self._records.drop(key)
                continue
            changed = [h for h in record.held.values() if h.fingerprint and not h.fingerprint.matches(storage)]
            if changed and not record.was_written:
                logger.warning("%s", UNSEEN_WRITE.format(changed[0].name))
            if changed:
                self._records.drop(key)

    def hold(self, tensors: Iterable[Tensor]) -> bool:
        """Whether there is anything of some of these."""
        return any(self._records.get(storage_id(tensor)) is not None for tensor in tensors)

    def forget(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Drop mirrors (all by default), so that the next step that needs them uploads afresh."""
        keys = [key for key, _ in self._records] if tensors is None else [storage_id(tensor) for tensor in tensors]
        for key in keys:
            self._records.drop(key)

    def purge(self) -> None:
        """Drop the mirrors of storages that no longer exist."""
        self._records.purge()

    def forget_storages(self, keys: Iterable[int]) -> None:
        """Drop the mirrors of storages that are about to be gone."""
        for key in keys:
            self._records.drop(key)

    def forget_all_but_weights(self) -> None:
        """Drop what a step may have written."""
        for key, record in self._records:
            if not record.holds(WEIGHTS):
                self._records.drop(key)

    def forget_weights(self, weights: Iterable[WeightKey]) -> None:
        """Drop the resident rows of these weights."""
        for weight in weights:
            record = self._records.get(weight.storage)
            if record is not None:
                self._records.changed(record)
                gone = {g for g, held in record.held.items() if held.category == WEIGHTS and weight.holds(g.offset)}
                record.held = {g: held for g, held in record.held.items() if g not in gone}

    def held_bytes(self, category: str) -> int:
        """Bytes that parts and resident rows of one category hold on the accelerator; those of whole storages aside."""
        held = [one for _, record in self._records for one in record.held.values() if one.category == category]
        memories = {one.memory for one in held if one.memory is not None}
        return sum(one.nbytes for one in held) + sum(memory.nbytes for memory in memories)


def _parts(record: Record, geometry: Geometry, request: Request) -> list[Held]:
    """What a record holds for a request: its value, and what that is the last rows of."""
    wanted = (geometry,) if request.base is None else (geometry, geometry_of(request.base))
    return [record.held[one] for one in wanted if one in record.held]


def _watched(found: Sequence[tuple[Record, Geometry]]) -> list[tuple[int, Fingerprint]]:
    """What of the values that are there has a fingerprint."""
    held = [(record.address, record.held.get(geometry)) for record, geometry in found]
    return [(address, one.fingerprint) for address, one in held if one is not None and one.fingerprint is not None]


__all__ = ["Mirrors"]
