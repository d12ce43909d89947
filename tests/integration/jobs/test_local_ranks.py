"""A job of the trainer service on several processes of its machine: cancelled, resumed, and killed with all of them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
from tiny_model import MODEL, write_tokenizer

from steersman.trainer.jobs.handler import JobsHandler
from steersman.trainer.jobs.launcher import LocalLauncher
from steersman.trainer.jobs.model import Job, JobKind, JobResources, JobSpec, JobState
from steersman.trainer.jobs.registry import STAGES
from steersman.trainer.jobs.validation import SettingsValidator

# On a busy machine each rank takes a minute to start.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 400
RANKS = 2


@pytest.fixture
async def handler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[JobsHandler]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    launcher = LocalLauncher()
    # As where there are CPUs for them.
    monkeypatch.setattr(launcher, "check", lambda resources: [])
    handler = JobsHandler(
        tmp_path / "runs", launcher=launcher, validator=SettingsValidator(STAGES), cancel_grace_seconds=240
    )
    await handler.start()
    yield handler
    for job in (await handler.list_page(page_size=0, page_token="", states=()))[0]:
        if job.active:
            await launcher.kill(job.handle)
    await handler.close()


def spec(folder: Path) -> JobSpec:
    data = folder / "told.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"w{3 + row}", "completion": "w3 w4 w5"}) + "\n" for row in range(20))
    )
    config = {
        "model": {"config": MODEL},
        "tokenizer": write_tokenizer(folder / "tokenizer"),
        "data": {"files": [str(data)]},
        "max_prompt_tokens": 8,
        "max_response_tokens": 10,
        "batch_size": 4,
        "max_steps": STEPS,
        "log_every_steps": 1,
        "save_every_steps": 0,
        "device": "cpu",
    }
    return JobSpec(kind=JobKind.SFT, config=config, resources=JobResources(num_processes=RANKS))


async def until(handler: JobsHandler, condition: Callable[[Job], bool]) -> Job:
    async with asyncio.timeout(300):
        while not condition(job := await handler.get("ranks")):
            await asyncio.sleep(0.02)
    return job


def ranks_of(job: Job) -> list[psutil.Process]:
    """The processes of a job that train."""
    below = psutil.Process(int(json.loads(job.handle)["pid"])).children(recursive=True)
    return [process for process in below if "RANK" in process.environ()]


async def test_a_job_on_two_processes_is_cancelled_resumed_and_killed(handler: JobsHandler, tmp_path: Path) -> None:
    await handler.create("ranks", spec(tmp_path))
    job = await until(handler, lambda job: job.progress.step > 0 or not job.active)
    log = Path(job.run_directory) / "log.txt"
    assert len(ranks_of(job)) == RANKS, log.read_text()[-4000:]
    await handler.cancel("ranks")
    job = await until(handler, lambda job: not job.active)
    assert (job.state, job.error) == (JobState.CANCELLED, ""), log.read_text()[-4000:]
    stopped_at = job.progress.step
    assert 0 < stopped_at < STEPS
    shards = Path(job.run_directory) / "checkpoints" / f"step-{stopped_at:08d}" / "shards"
    assert len(list(shards.iterdir())) == RANKS

    await handler.resume("ranks")
    job = await until(handler, lambda job: job.progress.step > stopped_at or not job.active)
    assert job.state is JobState.RUNNING, log.read_text()[-4000:]
    ranks = ranks_of(job)
    await LocalLauncher().kill(job.handle)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert alive == []
    job = await until(handler, lambda job: not job.active)
    assert job.state is JobState.FAILED
    assert "SIGKILL" in job.error
