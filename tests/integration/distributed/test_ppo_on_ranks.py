"""A PPO job under torchrun: the losses of one process; a rank that is killed, a run that is stopped, other world
sizes.
"""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_services import Services, ppo_settings
from torchrun import ended, torchrun

from steersman.trainer.jobs import standalone
from steersman.trainer.jobs.model import JobState
from steersman.trainer.jobs.store import DATABASE_FILE, JobStore
from steersman.trainer.stages.ppo import PpoConfig, run_ppo
from steersman.trainer.stages.run import Run, read_rows

# On a busy machine each rank takes a minute to start.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WORKER = ("-m", "steersman.trainer.jobs.worker")
PROMPTS_PER_STEP = 7


@pytest.fixture
async def services() -> AsyncIterator[Services]:
    services = Services()
    await services.start()
    yield services
    await services.stop()


def rows_of(directory: Path) -> list[dict[str, float]]:
    rows = read_rows(directory / "metrics.jsonl") if (directory / "metrics.jsonl").exists() else []
    # What one run says of its own seconds and bytes is no loss.
    return [
        {
            k: v
            for k, v in r.items()
            if not k.startswith(("time", "eps", "trainer/", "push/", "rollout/se", "rollout/ready"))
        }
        for r in rows
    ]


def require_alike(rows: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5)


def in_one_process(settings: dict[str, Any], directory: Path) -> None:
    with Run(directory, run_id="ranks") as run:
        assert run_ppo(PpoConfig.model_validate(settings), run).steps == settings["total_steps"]


def prepare(directory: Path, spec: Path, settings: dict[str, Any]) -> None:
    spec.write_text(json.dumps({"job_id": "ranks", "kind": "ppo", "config": settings, "resources": {}}))
    assert standalone.prepare(directory, spec)


def state_of(directory: Path) -> tuple[JobState, str]:
    store = JobStore(directory / DATABASE_FILE, journal=None)
    try:
        job = store.get("ranks")
        return job.state, job.error
    finally:
        store.close()


def ranks_of(process: asyncio.subprocess.Process) -> dict[int, psutil.Process]:
    return {int(child.environ()["RANK"]): child for child in psutil.Process(process.pid).children()}


async def test_a_job_goes_through_a_killed_rank_a_stop_and_three_world_sizes_as_if_nothing_had_been(
    services: Services, tmp_path: Path
) -> None:
    settings = ppo_settings(tmp_path, services.target)
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log.txt"
    await asyncio.to_thread(in_one_process, settings, whole)
    expected = rows_of(whole)
    assert len(expected) == 4

    # Two ranks; one is killed while the lead waits for rollouts of the fourth step.
    services.restart(hold_after=3 * PROMPTS_PER_STEP)
    prepare(broken, tmp_path / "spec.json", settings)
    async with torchrun(2, log, *WORKER, str(broken)) as process:
        async with asyncio.timeout(240):
            await services.holding.wait()
        require_alike(rows_of(broken), expected[:3])
        ranks_of(process)[1].kill()
        assert await ended(process, 120) != 0, log.read_text()
    state, error = state_of(broken)
    assert state is JobState.FAILED
    assert "rank 0 of 2 failed" in error

    # Three ranks go on from step 2, and are told to stop while the lead waits again: the checkpoint is of step 3.
    services.restart(hold_after=PROMPTS_PER_STEP)
    prepare(broken, tmp_path / "spec.json", settings)
    async with torchrun(3, log, *WORKER, str(broken)) as process:
        async with asyncio.timeout(240):
            await services.holding.wait()
        require_alike(rows_of(broken), expected[:3])
        # As from a cluster that takes the node of one rank alone.
        ranks_of(process)[2].send_signal(signal.SIGTERM)
        await ended(process, 120)
    assert "told to stop" in state_of(broken)[1]
    shards = broken / "checkpoints" / "step-00000003" / "shards"
    assert len(list(shards.glob("*.safetensors"))) == 3

    # One process does the rest.
    services.restart()
    await asyncio.to_thread(in_one_process, settings, broken)
    require_alike(rows_of(broken), expected)
    pickled = [path for path in broken.rglob("*") if path.suffix in {".pt", ".pth", ".bin", ".metadata", ".distcp"}]
    assert pickled == []
    assert {path.name for path in (broken / "model").iterdir()} == {path.name for path in (whole / "model").iterdir()}
