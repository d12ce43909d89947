"""Jobs in real processes: they end well, fail, are cancelled, are killed, are resumed, and outlive the service."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from worker_program import STAGES

from steersman.trainer.jobs import folder
from steersman.trainer.jobs.handler import JobsHandler
from steersman.trainer.jobs.launcher import LocalLauncher, WorkerStatus
from steersman.trainer.jobs.model import (
    Job,
    JobEvent,
    JobKind,
    JobProgress,
    JobResources,
    JobSpec,
    JobState,
    StateChange,
)
from steersman.trainer.jobs.validation import SettingsValidator
from steersman.wire.errors import SteersmanError

PROGRAM = str(Path(__file__).with_name("worker_program.py"))


class Service:
    """A jobs handler that can be stopped and started again over the same folder."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.handler: JobsHandler

    async def start(self, **settings: Any) -> None:
        self.handler = JobsHandler(
            self.runs,
            launcher=LocalLauncher((sys.executable, PROGRAM)),
            validator=SettingsValidator(STAGES),
            **settings,
        )
        await self.handler.start()

    async def create(self, job_id: str, **config: Any) -> Job:
        return await self.handler.create(job_id, JobSpec(kind=JobKind.SFT, config=config))

    async def events(self, job_id: str, after: int = 0) -> list[JobEvent]:
        async with asyncio.timeout(90):
            return [event async for event in self.handler.watch(job_id, after)]

    async def until(self, job_id: str, condition: Callable[[Job], bool]) -> Job:
        async with asyncio.timeout(90):
            while not condition(job := await self.handler.get(job_id)):
                await asyncio.sleep(0.02)
        return job


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    service = Service(tmp_path / "runs")
    await service.start()
    yield service
    for job in (await service.handler.list_page(page_size=0, page_token="", states=()))[0]:
        if job.active:
            await service.handler.cancel(job.id)
            await service.until(job.id, lambda job: not job.active)
    await service.handler.close()


def counted(job: Job) -> list[int]:
    rows = (Path(job.run_directory) / "metrics.jsonl").read_text().splitlines()
    return [int(json.loads(row)["count"]) for row in rows]


def states(events: list[JobEvent]) -> list[JobState]:
    return [event.payload.state for event in events if isinstance(event.payload, StateChange)]


def pid_of(job: Job) -> int:
    return int(json.loads(job.handle)["pid"])


async def test_a_job_runs_to_its_end(service: Service) -> None:
    with pytest.raises(SteersmanError, match=r"spec\.config\.steps is 0"):
        await service.create("good", steps=0)
    await service.create("good", steps=5)
    events = await service.events("good")
    assert states(events) == [JobState.PENDING, JobState.RUNNING, JobState.SUCCEEDED]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    job = await service.handler.get("good")
    assert job.progress == JobProgress(step=5, total_steps=5, message="counting")
    assert counted(job) == [1, 2, 3, 4, 5]
    result = json.loads((Path(job.run_directory) / "result.json").read_text())
    assert result == {"steps": 5, "stopped": False, "first_step": 0}


async def test_an_error_of_the_stage_is_the_error_of_the_job(service: Service) -> None:
    await service.create("bad", steps=4, halfway="fail")
    await service.events("bad")
    job = await service.handler.get("bad")
    assert (job.state, job.error) == (JobState.FAILED, "ValueError: counted the wrong way")
    assert "Traceback" in (Path(job.run_directory) / "log.txt").read_text()
    assert not (Path(job.run_directory) / "result.json").exists()


async def test_a_cancelled_job_checkpoints_and_goes_on_when_resumed(service: Service) -> None:
    await service.create("stopped", steps=6, halfway="wait")
    await service.until("stopped", lambda job: job.progress.step == 3)
    await service.handler.cancel("stopped")
    events = await service.events("stopped")
    assert states(events)[-2:] == [JobState.CANCELLING, JobState.CANCELLED]
    await service.handler.resume("stopped")
    rest = await service.events("stopped", after=events[-1].sequence)
    assert states(rest) == [JobState.PENDING, JobState.RUNNING, JobState.SUCCEEDED]
    job = await service.handler.get("stopped")
    assert job.num_attempts == 2
    assert counted(job) == [1, 2, 3, 4, 5, 6]
    assert json.loads((Path(job.run_directory) / "result.json").read_text())["first_step"] == 3


async def test_a_killed_worker_fails_its_job_and_says_how(service: Service) -> None:
    await service.create("killed", steps=4, halfway="die")
    await service.events("killed")
    job = await service.handler.get("killed")
    assert job.state is JobState.FAILED
    assert "SIGKILL" in job.error


async def test_a_killed_worker_is_started_again_from_its_checkpoint(service: Service) -> None:
    await service.handler.close()
    await service.start(max_attempts=2)
    await service.create("phoenix", steps=4, halfway="die")
    events = await service.events("phoenix")
    assert states(events)[-1] is JobState.SUCCEEDED
    job = await service.handler.get("phoenix")
    assert job.num_attempts == 2
    assert counted(job) == [1, 2, 3, 4]


async def test_the_next_service_adopts_the_worker_and_notices_its_death(service: Service) -> None:
    await service.create("orphan", steps=4, halfway="wait")
    job = await service.until("orphan", lambda job: job.progress.step == 2)
    await service.handler.close()
    os.kill(pid_of(job), 0)
    await service.start()
    adopted = await service.handler.get("orphan")
    assert (adopted.state, adopted.handle, adopted.num_attempts) == (JobState.RUNNING, job.handle, 1)
    os.kill(pid_of(job), signal.SIGKILL)
    dead = await service.until("orphan", lambda job: not job.active)
    assert dead.state is JobState.FAILED
    assert "job begins" in dead.error


async def test_a_stop_by_someone_else_is_no_cancellation(service: Service) -> None:
    await service.create("evicted", steps=4, halfway="wait")
    job = await service.until("evicted", lambda job: job.progress.step == 2)
    os.kill(pid_of(job), signal.SIGTERM)
    ended = await service.until("evicted", lambda job: not job.active)
    assert ended.state is JobState.FAILED
    assert "resume" in ended.error


async def test_a_worker_whose_node_is_taken_goes_on_when_the_cluster_starts_it_again(service: Service) -> None:
    class Cluster(LocalLauncher):
        """Starts a worker as a cluster does, and again when it says that it was stopped."""

        async def launch(self, run_directory: Path, resources: JobResources) -> str:
            return "rl/steersman-first-1/uid"

        async def status(self, handle: str) -> WorkerStatus:
            return WorkerStatus(alive=True)

    async def run_worker(job: Job) -> asyncio.subprocess.Process:
        environment = dict(os.environ) | {"STEERSMAN_WORKER_HANDLE": "rl/steersman-first-1/uid"}
        return await asyncio.create_subprocess_exec(sys.executable, PROGRAM, job.run_directory, env=environment)

    await service.handler.close()
    service.handler = JobsHandler(
        service.runs, launcher=Cluster(), validator=SettingsValidator(STAGES), journal="delete"
    )
    await service.handler.start()
    job = await service.create("first", steps=4, halfway="wait")
    worker = await run_worker(job)
    job = await service.until("first", lambda job: job.progress.step == 2)
    assert job.handle == "rl/steersman-first-1/uid"
    worker.send_signal(signal.SIGTERM)
    async with asyncio.timeout(60):
        assert await worker.wait() == 143
    job = await service.handler.get("first")
    assert (job.state, job.handle) == (JobState.PENDING, "rl/steersman-first-1/uid")
    worker = await run_worker(job)
    async with asyncio.timeout(60):
        assert await worker.wait() == 0
    ended = await service.handler.get("first")
    assert (ended.state, ended.num_attempts) == (JobState.SUCCEEDED, 2)
    assert counted(ended) == [1, 2, 3, 4]


async def test_a_second_worker_does_not_touch_a_folder_in_use(service: Service) -> None:
    await service.create("owned", steps=4, halfway="wait")
    job = await service.until("owned", lambda job: job.progress.step == 2)
    intruder = await asyncio.create_subprocess_exec(
        sys.executable, PROGRAM, job.run_directory, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        _, log = await intruder.communicate()
    assert intruder.returncode == 75
    assert b"another worker" in log
    assert folder.in_use(Path(job.run_directory))
    assert await service.handler.get("owned") == job
