"""One replica over two nodes, here two processes that share no engine: vLLM's workers meet over gloo, without Ray."""

import asyncio
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_fleet import TOLERANCE, WAIT_S, logprobs_of
from tiny_models import save_model
from tiny_versions import image_of

from steersman.cli.supervisor import ServiceSpec, Supervisor, free_port
from steersman.client import AsyncPolicyClient, AsyncWeightClient, SteersmanError
from steersman.trainer.weights.publisher import Publisher
from steersman.wire.errors import Code
from steersman.wire.identity import WeightVersion

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]
PROMPT = [7, 8, 9]


def pair_of_ports() -> int:
    """The first of two that follow each other and are free."""
    while True:
        port = free_port()
        try:
            with socket.create_server(("127.0.0.1", port + 1)):
                return port
        except OSError:
            continue


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model("llama", folder, 0)
    return folder


@pytest.fixture
def nodes(model: Path) -> Iterator[Supervisor]:
    """Node 0 and node 1."""
    together = ["--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", "127.0.0.1"]
    together += ["--master-port", str(pair_of_ports())]
    specs = []
    for rank in (0, 1):
        address = f"127.0.0.1:{free_port()}"
        arguments = ["--model", str(model), "--dtype", "float32", "--kv-cache-mib", "32", "--max-num-seqs", "8"]
        arguments += ["--load-chunk-bytes", "65536", "--port", address.rpartition(":")[2], "--metrics-port", "0"]
        arguments += [*together, "--node-rank", str(rank)]
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"}
        specs.append(ServiceSpec.of("policy", arguments, address=address, name=f"node {rank}", environment=environment))
    with Supervisor(specs, start_timeout=2 * WAIT_S) as supervisor:
        yield supervisor


async def test_weights_reach_all_nodes_and_none_outlives_another(nodes: Supervisor, model: Path) -> None:
    target, other = (nodes[f"node {rank}"].spec.address for rank in (0, 1))
    publisher = Publisher(AsyncWeightClient, run_id="nodes.1", targets=[target])
    async with AsyncPolicyClient(target) as client:
        # All weights, and then what changed.
        for step in (1, 2):
            version = WeightVersion(run_id="nodes.1", step=step)
            assert (await publisher.publish(image_of(model, version))).failures == {}
            (sample,) = await client.generate(PROMPT, max_tokens=40, ignore_eos=True, timeout=WAIT_S)
            assert [span.version for span in sample.weight_versions] == [version]
            expected = logprobs_of(model, version, PROMPT, sample.token_ids.tolist())
            assert np.abs(expected - sample.logprobs).max() < TOLERANCE
    await publisher.close()
    # Only node 0 is a replica.
    async with AsyncPolicyClient(other) as client:
        with pytest.raises(SteersmanError) as caught:
            await client.model(timeout=30.0)
    assert caught.value.code is Code.UNIMPLEMENTED
    # Nobody asks anything of it now: the loss of node 1 is noticed all the same.
    nodes["node 1"].kill()
    assert await asyncio.to_thread(nodes["node 0"].wait, 2 * WAIT_S) == 1
    assert nodes["node 1"].exit_code == -signal.SIGKILL
