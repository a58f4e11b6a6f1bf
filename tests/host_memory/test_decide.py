"""What is done about a storage, by what is known of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hetegen_compile.host_memory.decide import RESERVE_BYTES, Decision, Facts, decide, immovable
from hetegen_compile.host_memory.limits import Room
from hetegen_compile.host_memory.mappings import Kind

TIGHT = Room(RESERVE_BYTES + 99, "test")
facts = st.builds(
    Facts, st.integers(1, 1 << 40), st.sampled_from(list(Kind)), st.sampled_from(["", "someone else holds it"])
)
rooms = st.none() | st.builds(Room, st.integers(0, 1 << 42), st.just("test"))


@pytest.mark.parametrize("kind", [Kind.ANONYMOUS, Kind.SHARED_MEMORY, Kind.UNKNOWN])
def test_memory_is_pinned_in_place_however_little_is_left(kind: Kind) -> None:
    assert decide([Facts(1 << 40, kind)], Room(0, "test")) == [Decision("pin")]


def test_a_private_mapping_that_fits_is_adopted() -> None:
    assert decide([Facts(99, Kind.PRIVATE_FILE)], TIGHT) == [Decision("adopt")]
    assert decide([Facts(1 << 50, Kind.PRIVATE_FILE)], None) == [Decision("adopt")]


def test_mappings_that_do_not_fit_together_are_all_staged() -> None:
    found = decide([Facts(60, Kind.PRIVATE_FILE), Facts(40, Kind.PRIVATE_FILE), Facts(9, Kind.ANONYMOUS)], TIGHT)
    assert [decision.action for decision in found] == ["stage", "stage", "pin"]
    assert "adopting 100 B of such weights" in found[0].reason
    assert "exceeds the host memory left, 256.00 MiB (test)" in found[0].reason


def test_what_cannot_move_takes_no_room() -> None:
    found = decide([Facts(1 << 40, Kind.PRIVATE_FILE, "it is held"), Facts(99, Kind.PRIVATE_FILE)], TIGHT)
    assert found == [Decision("stage", "lies in a private file mapping: it is held"), Decision("adopt")]


def test_a_shared_mapping_stays_tied_to_its_file() -> None:
    (found,) = decide([Facts(1, Kind.SHARED_FILE)], None)
    assert found.action == "stage"
    assert "a shared file mapping" in found.reason


@given(st.lists(facts), rooms)
def test_adoption_never_exceeds_the_room_and_staging_has_a_reason(known: list[Facts], room: Room | None) -> None:
    found = decide(known, room)
    adopted = sum(fact.nbytes for fact, one in zip(known, found, strict=True) if one.action == "adopt")
    assert room is None or adopted == 0 or adopted + RESERVE_BYTES <= room.nbytes
    assert all(bool(one.reason) == (one.action == "stage") for one in found)


# ---- what can be moved ----------------------------------------------------------------------------------------


def test_parameters_that_nobody_else_views_can_move() -> None:
    base = nn.Parameter(torch.ones(4, 4))
    tied = nn.Parameter(base.data[1:])
    assert immovable([base, tied]) == ""
    assert immovable([nn.Parameter(torch.ones(4))]) == ""


def test_an_unseen_viewer_prevents_it() -> None:
    kept = torch.ones(4)
    assert "shares its memory" in immovable([nn.Parameter(kept)])


def test_a_buffer_prevents_it() -> None:
    parameter = nn.Parameter(torch.ones(4))
    assert "not (only) a parameter" in immovable([parameter, parameter.data])


def test_inference_mode_prevents_it() -> None:
    with torch.inference_mode():
        parameter = nn.Parameter(torch.ones(4), requires_grad=False)
    assert "inference mode" in immovable([parameter])
