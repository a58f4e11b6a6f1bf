"""The device values of a plan's inputs, in the order in which its step takes them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hetegen_compile.accelerators.base import Value
from hetegen_compile.accelerators.geometry import span_bytes
from hetegen_compile.accelerators.growing import Block, block_of, have_room, room_behind
from hetegen_compile.geometry import storage_id
from hetegen_compile.ir import info, is_tensor
from hetegen_compile.mirrors import WEIGHTS, Mirrors, Request
from hetegen_compile.mirrors.identity import geometry_of
from hetegen_compile.mirrors.settled import Settled
from hetegen_compile.mirrors.standing import Standing
from hetegen_compile.planning.room import Room
from hetegen_compile.steps.bound_step import BoundStep

UPLOADED_ONCE_BYTES = 1 << 12
"""Of what is new in a step and seldom given again (tokens, positions, masks): noting it takes longer than uploading."""


_LEAST_ROOM = 1
"""Tokens: what is lengthened by none has to lie in a block, too."""


@dataclass(frozen=True)
class InputFacts:
    """What is known of a graph's inputs before any call, by position.

    Attributes:
        names: what the user calls them.
        aliased: they share a storage with another input.
        model: parameters and buffers.
        fixed: those of them whose sizes and strides are numbers, which Dynamo guards: only address and version can
            differ between two calls.
    """

    names: Sequence[str]
    aliased: frozenset[int]
    model: frozenset[int]
    fixed: frozenset[int]

    @classmethod
    def of(
        cls, placeholders: Sequence[fx.Node], names: Sequence[str], aliased: frozenset[int], model: frozenset[int]
    ) -> InputFacts:
        """From the placeholders of a captured graph."""
        return cls(names, aliased, model, frozenset(i for i in model if _is_static(placeholders[i])))


def _is_static(placeholder: fx.Node) -> bool:
    if not is_tensor(placeholder):
        return False
    value: Tensor = info(placeholder).value
    return all(type(size) is int for size in (*value.shape, *value.stride(), value.storage_offset()))


class StepValues:
    """Fetches the values of one plan.

    Fixed inputs that the step does not write are asked for once and stand from then on; so do those that it writes on
    both sides, as long as it is the same step that writes them. What is small and new is uploaded for one step. The
    others are asked for at every step.
    """

    def __init__(self, bound: BoundStep, facts: InputFacts, first_rows: Mapping[int, int]) -> None:
        """``first_rows``: from which row on each weight is resident."""
        self._facts = facts
        self._first_rows = first_rows
        whole: list[tuple[int, int, int]] = [(i, 0, -1) for i in bound.mirrors]
        self._wanted = [*whole, *bound.residents]
        fixed = facts.fixed - {*bound.settled, *bound.outdated, *(one.given for one in bound.longer)}
        self._fixed = [place for place, (i, _, _) in enumerate(self._wanted) if i in fixed]
        self._written = [place for place, (i, _, _) in enumerate(self._wanted) if i in bound.settled]
        self._not_fixed = [place for place, (i, _, _) in enumerate(self._wanted) if i not in fixed]
        given = {*bound.mirrors} - facts.model - facts.aliased - {*bound.settled}  # each a tensor by itself
        self._given = [place for place in self._not_fixed if self._wanted[place][0] in given]
        self._before: dict[int, weakref.ref[Tensor]] = {}
        self._fixed_inputs = sorted({self._wanted[place][0] for place in self._fixed})
        self._standing: Standing | None = None
        self._written_inputs = [self._wanted[place][0] for place in self._written]
        self._settled_elsewhere = sorted(set(bound.settled) - set(self._written_inputs))
        self._settled: Settled | None = None
        places = {i: place for place, i in enumerate(bound.mirrors)}
        self._longer = [(places[one.given], one) for one in bound.longer]
        self._added = {one.added for one in bound.longer}  # of all layers one, as a rule
        self._seldom = sorted({*self._given} - {place for place, _ in self._longer})

    def fetch(self, mirrors: Mirrors, inputs: Sequence[Any], limit_bytes: int, room: Room) -> list[Value]:
        """The values for one step's inputs, uploading what is not current, with room behind what the step lengthens.

        Those may be moved in what ``room`` has for activations, of which there are none yet.

        Raises:
            NoRoomError: they do not fit ``limit_bytes`` beside activations.
        """
        values, once_bytes = self._fetched(mirrors, inputs, limit_bytes - room.activation_bytes)
        most = max([_LEAST_ROOM, *(added(inputs) for added in self._added)])
        if not have_room([values[place] for place, _ in self._longer], most):
            self._move(mirrors, inputs, values, limit_bytes - once_bytes, room)
        return values

    def _move(self, mirrors: Mirrors, inputs: Sequence[Any], values: list[Value], limit_bytes: int, room: Room) -> None:
        """Move what the step lengthens and has no room behind it."""
        blocks = set[Block | None]()  # two inputs may be one tensor: behind its value there is room for one of them
        moved = dict[Any, Value]()
        for place, cache in self._longer:
            value, tokens = values[place], max(_LEAST_ROOM, cache.added(inputs))
            if room_behind(value) < tokens or block_of(value) in blocks:
                request = self._request(place, inputs)
                most = max(room.context.room(cache.tokens), request.tensor.shape[-2] + tokens)
                itself = storage_id(request.tensor), geometry_of(request.tensor)
                if (before := block_of(moved.get(itself))) is not None:  # the first has it for this step, uncounted
                    limit_bytes -= before.nbytes
                value = values[place] = mirrors.give_room(request, value, most, limit_bytes)
                moved[itself] = value
            blocks.add(block_of(value))
        if moved:
            mirrors.fit(limit_bytes - room.activation_bytes)

    def _fetched(self, mirrors: Mirrors, inputs: Sequence[Any], limit_bytes: int) -> tuple[list[Value], int]:
        """The values where they lie, and the bytes of those that were uploaded for this step only."""
        fixed = [inputs[i] for i in self._fixed_inputs]
        standing = self._standing
        if standing is not None and mirrors.stands(standing, fixed):
            written = self._answer_for_written(mirrors, inputs)
            if written is None:
                mirrors.separate([inputs[i] for i in self._written_inputs])
            known = {} if written is None else dict(zip(self._written, written.values, strict=True))
            returned = mirrors.returned([inputs[self._wanted[place][0]] for place in self._given])
            known |= {place: value for place, value in zip(self._given, returned, strict=True) if value is not None}
            new = [place for place in self._seldom if place not in known and self._is_new(place, inputs, mirrors)]
            asked = [place for place in self._not_fixed if place not in known and place not in new]
            new_bytes = sum(span_bytes(inputs[self._wanted[place][0]]) for place in new)
            found = mirrors.fetch([self._request(place, inputs) for place in asked], limit_bytes - new_bytes)
            if standing.valid and (written is None or written.valid):  # nothing dropped to make room, or out of date
                known |= zip(asked, found, strict=True)
                known |= zip(self._fixed, standing.values, strict=True)
                known |= {place: mirrors.upload_once(self._request(place, inputs), limit_bytes) for place in new}
                return [known[place] for place in range(len(self._wanted))], new_bytes
        mirrors.separate([inputs[i] for i in self._written_inputs])
        requests = [self._request(place, inputs) for place in range(len(self._wanted))]
        values = mirrors.fetch(requests, limit_bytes)
        self._standing = mirrors.stand(fixed, [requests[place] for place in self._fixed])
        return values, 0

    def settle(self, mirrors: Mirrors, inputs: Sequence[Any]) -> None:
        """The step has written inputs on both sides."""
        self._settled = mirrors.settle([inputs[i] for i in self._written_inputs], self._settled)
        mirrors.settle([inputs[i] for i in self._settled_elsewhere])

    def _answer_for_written(self, mirrors: Mirrors, inputs: Sequence[Any]) -> Settled | None:
        """What stands for all that the step writes on both sides, if that is what the last one left."""
        settled = self._settled
        if settled is None or not mirrors.stands(settled, [inputs[i] for i in self._written_inputs]):
            return None
        return settled

    def _is_new(self, place: int, inputs: Sequence[Any], mirrors: Mirrors) -> bool:
        """Whether an input is small, nothing is known of it, and the step before was given another one."""
        tensor: Tensor = inputs[self._wanted[place][0]]
        if span_bytes(tensor) > UPLOADED_ONCE_BYTES or mirrors.knows(tensor):
            return False
        before, self._before[place] = self._before.get(place), weakref.ref(tensor)
        return before is None or before() is not tensor

    def _request(self, place: int, inputs: Sequence[Any]) -> Request:
        i, lo, hi = self._wanted[place]
        return self._mirror(i, inputs[i]) if hi < 0 else self._rows(i, inputs[i], lo, hi)

    def _mirror(self, i: int, tensor: Tensor) -> Request:
        """What a step reads of an input; where everything fits weights are inputs like any other."""
        facts, watched = self._facts, i in self._facts.model
        if self._first_rows.get(i) == 0 and i not in facts.aliased:
            return Request(tensor, facts.names[i], WEIGHTS, watched=watched)
        return Request(tensor, facts.names[i], whole=i in facts.aliased, watched=watched)

    def _rows(self, i: int, weight: Tensor, lo: int, hi: int) -> Request:
        """Resident rows of a weight: all that the ledger keeps, or the last of them."""
        with torch.no_grad():  # not detached: they are views of the weight itself, as long as that is there
            rows, base = weight[lo:hi], weight[self._first_rows[i] :]
        return Request(rows, self._facts.names[i], WEIGHTS, watched=True, base=base)


__all__ = ["InputFacts", "StepValues"]
