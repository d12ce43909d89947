"""The simulator in the limits that can be written down."""

import math

import pytest
from benchmarks.relay_simulator import Costs, Load, Network, Prediction, predict

from steersman.trainer.weights.routes import Node, Topology, plan

MIB = 2**20
FREE = Costs(chunk_bytes=MIB, send_s=0.0, receive_s=0.0, forward_s=0.0, hop_s=0.0)
LINK = Network(bytes_per_second=100.0 * MIB)
DENSE = Load(dense_bytes=1000 * MIB, wire_bytes=1000 * MIB)
ONCE_S = 10.0


def seconds(
    num: int, topology: Topology, *, costs: Costs = FREE, load: Load = DENSE, network: Network = LINK, fan_out: int = 2
) -> float:
    return result(num, topology, costs=costs, load=load, network=network, fan_out=fan_out).seconds


def result(
    num: int, topology: Topology, *, costs: Costs = FREE, load: Load = DENSE, network: Network = LINK, fan_out: int = 2
) -> Prediction:
    return predict(plan(range(num), [], topology, fan_out=fan_out, nbytes=load.wire_bytes), load, costs, network)


def with_costs(**changed: float) -> Costs:
    return Costs(**{**vars(FREE), **changed})  # type: ignore[arg-type]


def test_one_replica_takes_bytes_over_bandwidth() -> None:
    assert seconds(1, Topology.DIRECT) == pytest.approx(ONCE_S)


def test_direct_takes_as_many_times_as_there_are_replicas() -> None:
    assert seconds(8, Topology.DIRECT) == pytest.approx(8 * ONCE_S)
    assert result(8, Topology.DIRECT).trainer_bytes == 8 * DENSE.wire_bytes


@pytest.mark.parametrize("num", [2, 8, 64])
def test_a_chain_takes_it_once_and_a_chunk_and_a_hop_for_each_replica(num: int) -> None:
    chunk_s = MIB / LINK.bytes_per_second
    assert seconds(num, Topology.CHAIN) == pytest.approx(ONCE_S + (num - 1) * chunk_s)
    # The stream to the last replica opens after so many hops, and then takes as long as any.
    assert seconds(num, Topology.CHAIN, costs=with_costs(hop_s=0.5)) == pytest.approx(num * 0.5 + ONCE_S)
    assert result(num, Topology.CHAIN).trainer_bytes == DENSE.wire_bytes


@pytest.mark.parametrize("fan_out", [2, 4])
def test_a_tree_takes_it_as_many_times_as_it_fans_out(fan_out: int) -> None:
    num = sum(fan_out**level for level in range(4))
    depth_s = 3 * fan_out * MIB / LINK.bytes_per_second
    assert seconds(num, Topology.TREE, fan_out=fan_out) == pytest.approx(fan_out * ONCE_S, abs=depth_s)


def test_a_fast_link_waits_for_the_event_loop() -> None:
    costs = with_costs(send_s=0.001, receive_s=0.002, forward_s=0.003)
    fast = Network(bytes_per_second=math.inf)
    assert seconds(1, Topology.DIRECT, costs=costs, network=fast) == pytest.approx(1000 * 0.002 + 0.001)
    chain = seconds(8, Topology.CHAIN, costs=costs, network=fast)
    assert chain == pytest.approx(1000 * (0.002 + 0.003), rel=0.05)
    assert seconds(8, Topology.DIRECT, costs=costs, network=fast) == pytest.approx(1000 * 8 * 0.001, rel=0.05)


@pytest.mark.parametrize("topology", [Topology.DIRECT, Topology.CHAIN, Topology.TREE])
def test_the_running_maximum_is_the_recurrence(topology: Topology) -> None:
    costs = with_costs(send_s=0.001, receive_s=0.002, forward_s=0.008, hop_s=0.05)
    routes = plan(range(20), [], topology, fan_out=3, nbytes=0)
    load = Load(dense_bytes=40 * MIB, wire_bytes=40 * MIB)
    assert predict(routes, load, costs, LINK).seconds == pytest.approx(chunk_by_chunk(routes, 40, costs), rel=1e-9)


def chunk_by_chunk(routes: list[Node[int]], num_chunks: int, costs: Costs) -> float:
    """The module's recurrences, as they stand there."""
    wire_s = MIB / LINK.bytes_per_second
    loop: dict[object, float] = {}
    card: dict[object, float] = {}
    last = 0.0
    for _ in range(num_chunks):
        todo: list[tuple[object, list[Node[int]], float, float, int]] = [("trainer", routes, 0.0, 0.0, 1)]
        while todo:
            name, behind, arrival, take_s, depth = todo.pop()
            now = max(arrival, loop.get(name, 0.0))
            for node in behind:
                now += costs.send_s if name == "trainer" else costs.forward_s
                card[name] = max(now, depth * costs.hop_s, card.get(name, 0.0)) + wire_s
                todo.append((node, node.next, card[name], costs.receive_s, depth + 1))
            loop[name] = now + take_s
            last = max(last, loop[name])
    return last


def test_a_shared_machine_does_all_the_work() -> None:
    costs = with_costs(send_s=0.001, receive_s=0.002, forward_s=0.003, verify_s_per_byte=1e-9)
    network = Network(shared_cores=2)
    work = 1000 * (0.001 + 7 * 0.003 + 8 * 0.002)
    verify = (1 + 8 / 2) * DENSE.dense_bytes * 1e-9  # here, and then everywhere
    assert seconds(8, Topology.CHAIN, costs=costs, network=network) == pytest.approx(work / 2 + verify)
    assert result(8, Topology.CHAIN, costs=costs, network=network).cpu_seconds == pytest.approx(work)


def test_a_delta_waits_for_its_encoder_and_is_applied_everywhere() -> None:
    delta = Load(dense_bytes=1000 * MIB, wire_bytes=10 * MIB, is_delta=True)
    encoding = with_costs(encode_s_per_byte=1 / (100 * MIB))
    assert seconds(8, Topology.CHAIN, costs=encoding, load=delta) == pytest.approx(10.0, rel=0.05)
    applying = with_costs(apply_s_per_byte=1 / (100 * MIB))
    # Chunks are applied one after the other, while the later ones travel: once, and one more chunk for each hop.
    assert seconds(8, Topology.CHAIN, costs=applying, load=delta) == pytest.approx(10.0, rel=0.05)


def test_verification_is_on_both_sides_and_activation_comes_last() -> None:
    costs = with_costs(begin_s=1.0, activate_s=2.0, verify_s_per_byte=3.0 / DENSE.dense_bytes)
    assert seconds(1, Topology.DIRECT, costs=costs) == pytest.approx(1 + 3 + ONCE_S + 3 + 2)
