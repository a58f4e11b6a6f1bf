"""A chain beside a link that is ahead by a ring at most."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetegen_compile.cost_model import Chain, Trip, step_with_ring
from tests.cost_model.test_chain import chains

shares = st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3)


@settings(derandomize=True)
@given(chains, shares, st.floats(0.0, 20.0), st.floats(0.0, 20.0))
def test_it_is_never_below_the_chain_and_a_longer_ring_never_hurts(
    chain: Chain, some: list[float], ring_s: float, more_s: float
) -> None:
    own = some[: len(chain.trips)]
    found = step_with_ring(chain, own, ring_s)
    assert found >= chain.path_s(own) - 1e-9
    assert step_with_ring(chain, own, ring_s + more_s) <= found + 1e-9


def test_an_output_layer_waits_for_what_the_ring_does_not_hold() -> None:
    layers = [Trip(host_s=0.0, link_s=0.0, accelerator_s=1.0, accelerator_saved_s=0.0)] * 9
    output = Trip(host_s=9.0, link_s=5.0, accelerator_s=0.5, accelerator_saved_s=0.5)
    chain = Chain((*layers, output), serial_s=0.0)
    assert chain.step_s([0.0] * 10) == pytest.approx(9.5)
    assert step_with_ring(chain, [0.0] * 10, 2.0) == pytest.approx(9 + 5 - 2)
    assert step_with_ring(chain, [0.0] * 10, 5.0) == pytest.approx(9.5)
