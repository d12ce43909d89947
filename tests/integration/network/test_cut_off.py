"""A PPO job whose services are hosts of their own, by TLS and token; one after the other is cut off and comes back.

Nothing says that a host is cut off: no connection is refused or reset, what is sent just gets lost. The job must notice
by itself, wait, say so, and lose and double no sample.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from namespaces import Network
from processes import WAIT_S, Job, service
from tiny_job import NUM_PROMPTS, NUM_SAMPLES, save_model, settings, tokenizer_of

from steersman.trainer.stages.run import read_rows

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 7
PORT = 50051
TOKEN = "of-the-trainer"
REPLICA = Path(__file__).parents[1] / "weights" / "replica_program.py"
SCORER = '''
"""Counts a word, and stands at a gate while that is shut."""

import os
import time
from pathlib import Path

GATES = Path(os.environ["STEERSMAN_TEST_GATES"])


def score(items):
    if (GATES / "score.shut").exists():
        (GATES / "score.entered").touch()
        while (GATES / "score.shut").exists():
            time.sleep(0.02)
    return [float(item.response.split().count("w7")) / 12.0 for item in items]
'''


class Gates:
    """Where services stand still when they are told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def shut(self, gate: str) -> None:
        (self.folder / f"{gate}.shut").touch()

    def open(self, gate: str) -> None:
        (self.folder / f"{gate}.shut").unlink()

    async def entered(self, gate: str) -> None:
        async with asyncio.timeout(WAIT_S):
            while not (self.folder / f"{gate}.entered").exists():
                await asyncio.sleep(0.02)


@pytest.fixture
def network() -> Any:
    with Network("trainer", "policy", "reference", "reward") as made:
        yield made


@pytest.fixture
async def services(network: Network, tmp_path: Path) -> AsyncIterator[Gates]:
    """Each service on its host, listening on its address with TLS, to the trainer's token alone."""
    save_model(tmp_path / "model")
    (tmp_path / "count.py").write_text(SCORER)
    (tmp_path / "token").write_text(TOKEN)
    roles = ["generate", "logprobs", "score", "push_weights"]
    caller = {"name": "trainer", "token_sha256": hashlib.sha256(TOKEN.encode()).hexdigest(), "roles": roles}
    (tmp_path / "callers.yaml").write_text(yaml.safe_dump({"callers": [caller]}))
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    gates = Gates(tmp_path / "gates")
    model = ["--model", str(tmp_path / "model"), "--dtype", "float32"]
    scorer = {
        "count": {"function": f"{tmp_path / 'count.py'}:score", "tokenizer": str(tokenizer_of(tmp_path / "model"))}
    }
    commands = {
        "policy": [str(REPLICA), *model, "--kv-cache-mib", "32", "--max-num-seqs", "32"],
        "reference": ["-m", "steersman.reference", *model],
        "reward": ["-m", "steersman.reward", "--scorers", json.dumps(scorer)],
    }
    async with AsyncExitStack() as stack:
        starting = []
        for host, command in commands.items():
            issued = authority.issue_cert(network.address(host))
            certificate, key = tmp_path / f"{host}.pem", tmp_path / f"{host}.key"
            certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
            key.write_bytes(issued.private_key_pem.bytes())
            command += ["--host", network.address(host), "--port", str(PORT), "--keepalive-seconds", "5"]
            command += ["--tls.certificate", str(certificate), "--tls.private-key", str(key)]
            command += ["--access-file", str(tmp_path / "callers.yaml")]
            environment = {"STEERSMAN_TEST_GATES": str(gates.folder)}
            starting.append(stack.enter_async_context(service(network, host, command, tmp_path, environment)))
        await asyncio.gather(*starting)
        yield gates


def config(network: Network, folder: Path) -> dict[str, Any]:
    at = {host: f"{network.address(host)}:{PORT}" for host in ("policy", "reference", "reward")}
    services = {
        "policies": [at["policy"]],
        "reference": at["reference"],
        "reward": at["reward"],
        "credentials": {"ca_file": str(folder / "ca.pem"), "token_file": str(folder / "token")},
        "keepalive_seconds": 5,
        "give_up_seconds": 300,
    }
    return settings(folder / "model", folder, services, max_staleness=0, total_steps=STEPS)


async def test_services_are_cut_off_and_come_back(network: Network, services: Gates, tmp_path: Path) -> None:
    given = {"directory": str(tmp_path / "run"), "config": config(network, tmp_path), "pause_after": [1, 3, 5]}
    # Where the service stands when it is cut off, and which one; what is under way then gets lost.
    cuts = [(1, "generate", "policy"), (3, "receive", "policy"), (5, "score", "reward")]
    async with Job.on(network, "trainer", tmp_path, **given) as job:
        for step, gate, host in cuts:
            await job.says("step", step=step)
            services.shut(gate)
            await job.go_on()
            await services.entered(gate)
            network.cut_off(host)
            services.open(gate)
            waits = await job.says("progress", message="waiting for ")
            assert network.address(host) in waits["message"]
            network.bring_back(host)
        assert await job.says("end") == {"event": "end", "steps": STEPS, "stopped": False}
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["episode"] for row in rows] == [NUM_PROMPTS * NUM_SAMPLES * step for step in range(1, STEPS + 1)]
    assert sum(row["rollout/dropped"] for row in rows) == 0
    assert sum(row["rollout/stale_redrawn"] for row in rows) == 0
    # What was being drawn when the policy was cut off was drawn again, and nothing else.
    assert [row["step"] for row in rows if row["rollout/resent"]] == [2]
