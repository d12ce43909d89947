"""Routes reach everybody once, within the limits of the protocol."""

from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.trainer.weights.routes import Node, Topology, choose, plan
from steersman.wire.limits import MAX_RELAY_DEPTH, MAX_RELAY_FAN_OUT, MAX_RELAY_HOPS

GIGABYTE = 10**9


def shape(routes: list[Node[int]]) -> list[object]:
    return [[node.item, *shape(node.next)] if node.next else node.item for node in routes]


def planned(
    num: int, topology: Topology, *, num_leaves: int = 0, fan_out: int = 2, nbytes: int = GIGABYTE
) -> list[object]:
    items = list(range(num))
    return shape(plan(items[: num - num_leaves], items[num - num_leaves :], topology, fan_out=fan_out, nbytes=nbytes))


def test_small_fleets_by_hand() -> None:
    assert planned(3, Topology.DIRECT) == [0, 1, 2]
    assert planned(4, Topology.CHAIN) == [[0, [1, [2, 3]]]]
    assert planned(7, Topology.TREE) == [[0, [1, 3, 4], [2, 5, 6]]]
    assert planned(5, Topology.TREE, fan_out=3) == [[0, [1, 4], 2, 3]]
    assert planned(1, Topology.CHAIN) == [0]
    assert planned(0, Topology.CHAIN) == []


def test_leaves_hang_below_the_last_and_are_sent_to_from_here_only_if_there_is_nobody_else() -> None:
    assert planned(4, Topology.CHAIN, num_leaves=1) == [[0, [1, [2, 3]]]]
    assert planned(4, Topology.CHAIN, num_leaves=2) == [[0, [1, 2], 3]]
    assert planned(3, Topology.CHAIN, num_leaves=3) == [0, 1, 2]


def test_a_fleet_that_is_too_long_for_a_chain_gets_several() -> None:
    routes = plan(range(2 * MAX_RELAY_DEPTH + 1), [], Topology.CHAIN, fan_out=2, nbytes=0)
    assert sorted(route.height for route in routes) == [43, 43, 43]


@settings(max_examples=40, deadline=None)
@given(
    num_relays=st.integers(0, 2500),
    num_leaves=st.integers(0, 2500),
    topology=st.sampled_from(Topology),
    fan_out=st.integers(2, MAX_RELAY_FAN_OUT),
    nbytes=st.integers(0, 10**12),
)
def test_everybody_is_reached_once_within_the_limits(
    num_relays: int, num_leaves: int, topology: Topology, fan_out: int, nbytes: int
) -> None:
    relays, leaves = range(num_relays), range(num_relays, num_relays + num_leaves)
    routes = plan(relays, leaves, topology, fan_out=fan_out, nbytes=nbytes)
    reached = [node for route in routes for node in route.walk()]
    assert sorted(node.item for node in reached) == list(range(num_relays + num_leaves))
    assert all(not node.next for node in reached if node.item in leaves)
    for route in routes:
        hops = [node for node in route.walk() if node is not route]
        assert len(hops) <= MAX_RELAY_HOPS
        assert route.height - 1 <= MAX_RELAY_DEPTH
        assert all(len(node.next) <= MAX_RELAY_FAN_OUT for node in route.walk())


def test_auto_takes_a_chain_for_what_is_large_and_a_tree_for_what_is_small() -> None:
    assert choose(3, 100 * GIGABYTE, fan_out=2) is Topology.DIRECT
    assert choose(8, GIGABYTE, fan_out=2) is Topology.CHAIN
    assert choose(64, 10_000_000, fan_out=2) is Topology.TREE
    # A chain of a thousand would leave from here sixteen times.
    assert choose(1000, 100 * GIGABYTE, fan_out=2) is Topology.TREE
