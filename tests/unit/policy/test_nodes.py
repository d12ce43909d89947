"""Machines that run one replica together: their settings, and how they notice that one is gone."""

import socket

import pytest

from steersman.policy.engine.bond import Bond, Head, bond_port
from steersman.policy.engine.options import Nodes
from steersman.policy.engine.port import EngineDeadError
from steersman.policy.settings import PolicySettings
from steersman.serving.location import Location
from steersman.serving.settings import SettingsError

TOGETHER = ("--model", "m", "--tensor-parallel-size", "4", "--pipeline-parallel-size", "2", "--nnodes", "2")


def test_nodes_of_a_replica(tmp_path) -> None:
    settings = PolicySettings.load(
        [*TOGETHER, "--node-rank", "1", "--master-addr", "policy-0.policy-nodes", "--nodes-in-clear"]
    )
    options = settings.engine_options(Location(folder=tmp_path, name="m"), on_cpu=False)
    assert options.nodes == Nodes(count=2, rank=1, address="policy-0.policy-nodes", port=29501)
    assert (options.tensor_parallel_size, options.pipeline_parallel_size) == (4, 2)
    assert PolicySettings.load(["--model", "m", "--master-addr", "somewhere"]).nodes() is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--nnodes", "3"), "nnodes is 3, allowed: a divisor of the 8 GPUs"),
        (("--node-rank", "2"), "node_rank is 2, allowed: below nnodes, which is 2"),
        ((), "master_addr is not set"),
        (
            ("--master-addr", "10.0.0.1"),
            "vLLM talks in the clear to all who reach it; allowed: loopback, or with nodes_in_clear",
        ),
        (("--master-port", "65535"), "master_port: is '65535'"),
    ],
)
def test_nodes_that_do_not_fit(arguments: tuple[str, ...], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        PolicySettings.load([*TOGETHER, *arguments])


@pytest.fixture
def nodes() -> Nodes:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return Nodes(count=3, rank=0, address="127.0.0.1", port=port - 1)


def lost(end: Head | Bond) -> str:
    """Why an end says that another is gone, once the news has come through the loopback."""
    while True:
        try:
            end.check()
        except EngineDeadError as error:
            return str(error)


def test_a_node_that_is_gone_is_noticed_at_node_0(nodes: Nodes) -> None:
    head = Head(nodes)
    try:
        head.check()
        first, second = Bond(nodes), Bond(nodes)
        for end in (head, first, second):
            end.check()
        second.close()
        assert lost(head) == "the node at 127.0.0.1 is gone"
        first.check()
    finally:
        head.close()
    # And with node 0 all others end.
    assert lost(first) == "node 0 at 127.0.0.1 is gone"
    first.close()


def test_without_node_0_there_is_no_bond(nodes: Nodes) -> None:
    assert bond_port(nodes) == nodes.port + 1
    with pytest.raises(ConnectionRefusedError):
        Bond(nodes)
