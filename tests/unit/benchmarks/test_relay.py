"""What the relay benchmark makes of its measurements."""

import os
import socket
from pathlib import Path

import pytest
from benchmarks import relay
from benchmarks.relay_sides import cpu_s, sent_bytes
from benchmarks.relay_simulator import Network, predict

from steersman.trainer.weights.routes import Topology, plan

MIB = 2**20
CHUNKS = 100


def row(seconds: float, *cpu: float) -> dict[str, object]:
    return {
        "seconds": seconds,
        "stream_s": 0.1,
        "stage_s": 0.02,
        "stream_cpu_s": list(cpu),
        "pushed_bytes": CHUNKS * MIB,
    }


def series() -> relay.Series:
    """Send 1 ms, receive 2 ms, forward 3 ms a chunk; 5 ms a hop; 0.1 s to begin; 5 GB/s to verify, with some noise."""
    found = {
        "weights": [{"dense_bytes": CHUNKS * MIB}],
        "one": [row(0.24, 0.1, 0.2), row(0.9, 0.5, 0.9), row(0.23, 0.08, 0.19)],
        "two": [row(0.5, 0.1, 0.6, 0.3)],
        "hops": [{"length": n, "seconds": 0.002 + 0.005 * n + noise} for n in range(1, 9) for noise in (0.0, 0.03)],
        "delta, one": [row(0.1, 0.1, 0.1) | {"pushed_bytes": CHUNKS * MIB // 50}],
    }
    names = [f"{prefix}{topology}" for prefix in ("", "delta, ") for topology in ("direct", "chain", "tree")]
    return found | {name: [row(1.0, 1.0, 1.0)] for name in names}


def test_the_constants_of_a_hop_are_found() -> None:
    costs, constants = relay.calibrate(series())
    assert (costs.send_s, costs.receive_s, costs.forward_s) == pytest.approx((0.001, 0.002, 0.003))
    assert costs.hop_s == pytest.approx(0.005)
    assert costs.begin_s == pytest.approx(0.1)
    assert costs.verify_s_per_byte == pytest.approx(0.02 / (CHUNKS * MIB))
    assert constants["forward_ms_per_chunk"] == 3.0


def test_crowding_is_what_half_the_fleet_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "CORES", 2)
    costs, _ = relay.calibrate(series())
    alone = CHUNKS * (0.001 + 3 * 0.003 + 4 * 0.002)
    half = {"half": [row(1.0, 1.3 * alone, 0, 0, 0, 0)], "delta, half": [row(1.0, 1e-9, 0, 0, 0, 0)]}
    found = relay.crowded(series() | half, costs)
    # Five processes on two cores: three times in five another one was there.
    assert found.crowding == pytest.approx(0.3 / 0.6)
    assert found.delta_crowding == 0.0
    checked = relay.check(series(), found, 8)
    expected = CHUNKS * (0.001 + 7 * 0.003 + 8 * 0.002) * (1 + 0.5 * 7 / 9)
    assert checked["chain"]["predicted_cpu_s"] == pytest.approx(expected, rel=1e-3)


def test_the_check_and_the_table_cover_every_load_and_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "PREDICTED_REPLICAS", (8, 100))
    costs, _ = relay.calibrate(series())
    checked = relay.check(series(), costs, 8)
    assert list(checked) == ["direct", "chain", "tree", "delta, direct", "delta, chain", "delta, tree"]
    expected = CHUNKS * (0.001 + 7 * 0.003 + 8 * 0.002)
    assert checked["chain"]["predicted_cpu_s"] == pytest.approx(expected, rel=1e-3)
    assert checked["chain"]["measured_over_predicted_cpu_s"] == pytest.approx(2.0 / expected, rel=1e-3)
    rows = relay.table(costs, series())
    assert len(rows) == 2 * len(relay.PREDICTED_GBIT_PER_S) * 2
    first = rows[0]
    assert (first["load"], first["gbit_per_s"], first["replicas"]) == ("dense", 10, 8)
    assert (first["direct_trainer_gb"], first["chain_trainer_gb"]) == (128.0, 16.0)
    load = relay._load(series(), relay.PREDICTED_DENSE_BYTES, is_delta=False)
    routes = plan(range(8), [], Topology.CHAIN, fan_out=2, nbytes=load.wire_bytes)
    again = predict(routes, load, costs, Network(bytes_per_second=1.25e9))
    assert first["chain"] == pytest.approx(again.seconds, abs=0.01)


def test_the_kernel_counts_what_a_socket_sends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sender:
        taken, _ = listener.accept()
        with taken:
            before, descriptors = sent_bytes(), num_descriptors()
            sender.sendall(b"x" * 12_345)
            assert len(_all(taken, 12_345)) == 12_345
            assert sent_bytes() - before == 12_345
            assert num_descriptors() == descriptors


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _all(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        found += connection.recv(count)
    return found


def test_processor_time_grows_with_work() -> None:
    before = cpu_s(os.getpid())
    assert sum(range(2_000_000))
    assert cpu_s(os.getpid()) > before > 0
