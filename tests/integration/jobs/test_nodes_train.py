"""A job on two nodes, for real: torchrun on each, gloo between them; one is killed, and all goes on with another."""

import asyncio
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from test_nodes import two_free_ports
from tiny_model import MODEL, write_tokenizer

from steersman.cli.cluster_jobs import job_objects
from steersman.client.types import JobKind
from steersman.cluster.resources import JobResources
from steersman.cluster.settings import KubernetesSettings
from steersman.trainer.jobs.standalone import prepare

PROGRAM = str(Path(__file__).with_name("node_program.py"))
STEPS = 40


async def start(node: int, port: int, run: Path) -> asyncio.subprocess.Process:
    environment = {
        "JOB_COMPLETION_INDEX": str(node),
        "STEERSMAN_WORKER_HANDLE": "rl/steersman-mine-1/uid",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with (run.parent / f"node-{node}.log").open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, PROGRAM, "train", str(port), str(run)),
            env=dict(os.environ) | environment,
            stdout=log,
            stderr=log,
        )


def kill(pod: asyncio.subprocess.Process) -> None:
    """A machine is switched off."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        node = psutil.Process(pod.pid)
        for process in [node, *node.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [int(json.loads(row)["step"]) for row in rows if row.endswith("\n")]


@pytest.mark.slow
@pytest.mark.timeout(540)
async def test_a_killed_node_costs_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    data = tmp_path / "told.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"w{3 + row}", "completion": "w3 w4 w5"}) + "\n" for row in range(20))
    )
    config = {
        "model": {"config": MODEL},
        "tokenizer": write_tokenizer(tmp_path / "tokenizer"),
        "data": {"files": [str(data)]},
        "max_prompt_tokens": 8,
        "max_response_tokens": 10,
        "batch_size": 4,
        "max_steps": STEPS,
        "save_every_steps": 4,
        "log_every_steps": 1,
        "device": "cpu",
    }
    settings = KubernetesSettings(image="trainer:1", run_claim="runs", run_mount_path=str(tmp_path / "runs"))
    resources = JobResources(num_processes=2, processes_per_node=1)
    job, _ = job_objects("mine", JobKind.SFT, config, resources, settings, namespace="rl")
    spec, run = tmp_path / "job.json", tmp_path / "runs" / "mine"
    spec.write_text(job["metadata"]["annotations"]["steersman/job"])
    assert prepare(run, spec)
    port = two_free_ports()
    pods = [await start(node, port, run) for node in range(2)]
    try:
        async with asyncio.timeout(240):
            while max(steps(run), default=0) < 6:
                assert pods[0].returncode is None, (run.parent / "node-0.log").read_text()[-4000:]
                await asyncio.sleep(0.05)
        kill(pods[1])
        await pods[1].wait()
        pods[1] = await start(1, port, run)
        async with asyncio.timeout(240):
            assert [await pod.wait() for pod in pods] == [0, 0], (run.parent / "node-0.log").read_text()[-4000:]
    finally:
        for pod in pods:
            if pod.returncode is None:
                kill(pod)
                await pod.wait()
    assert steps(run) == list(range(1, STEPS + 1))
    assert "going on from step" in (run.parent / "node-0.log").read_text()
