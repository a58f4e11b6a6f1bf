"""Vector clocks order exactly what the operations say."""

from hypothesis import given
from hypothesis import strategies as st

from hetegen_compile.accelerators.emulated.clocks import COMPUTE, DOWN, HOST, UP, Access, Clocks, covers

LANES = (HOST, COMPUTE, UP, DOWN)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("issue"), st.sampled_from(LANES), st.sampled_from(LANES)),
        st.tuples(st.just("merge"), st.sampled_from(LANES), st.sampled_from(LANES)),
    ),
    max_size=40,
)


def test_issue_order_is_an_edge_from_the_host_only() -> None:
    clocks = Clocks()
    host = clocks.issue(HOST, "host")
    up = clocks.issue(UP, "up")
    clocks.issue(COMPUTE, "compute")
    assert covers(clocks.now(COMPUTE), host)
    assert not covers(clocks.now(COMPUTE), up)
    clocks.merge(COMPUTE, clocks.now(UP))
    assert covers(clocks.now(COMPUTE), up)


@given(EVENTS)
def test_covered_equals_reachable_in_the_graph_of_events(events: list[tuple[str, int, int]]) -> None:
    clocks = Clocks()
    known: dict[int, set[Access]] = {lane: set() for lane in LANES}  # everything before a lane's next operation
    issued: list[Access] = []
    for kind, lane, other in events:
        if kind == "merge":
            clocks.merge(lane, clocks.now(other))
            known[lane] |= known[other]
        else:
            access = clocks.issue(lane, "node")
            issued.append(access)
            known[lane] |= known[HOST] | {access}
        for access in issued:
            assert covers(clocks.now(lane), access) == (access in known[lane])


def test_join_orders_everything() -> None:
    clocks = Clocks()
    accesses = [clocks.issue(lane, "node") for lane in LANES]
    clocks.join()
    assert all(covers(clocks.now(lane), access) for lane in LANES for access in accesses)
