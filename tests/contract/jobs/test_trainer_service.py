"""TrainerService over a real server; workers are played by the test through the store."""

import asyncio
import resource
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from steersman.serving.metrics import Metrics
from steersman.serving.server import RunningServer, start_server
from steersman.trainer.jobs.handler import MAX_SPEC_BYTES
from steersman.trainer.jobs.launcher import WorkerStatus
from steersman.trainer.jobs.model import Job, JobKind, JobProgress, JobResources, JobSpec, JobState, StepMetrics
from steersman.trainer.jobs.service import build
from steersman.trainer.jobs.settings import TrainerSettings
from steersman.trainer.jobs.store import DATABASE_FILE, JobStore
from steersman.v1 import trainer_pb2, trainer_pb2_grpc
from steersman.wire.errors import Code, FieldViolation, Reason, SteersmanError
from steersman.wire.status import DETAILS_TRAILER, decode_error


class FakeLauncher:
    """Workers that live until the test, or the service, ends them."""

    def __init__(self) -> None:
        self.launched: list[Path] = []
        self.endings: dict[str, str] = {}
        self.stopped: list[str] = []
        self.killed: list[str] = []
        self.broken: set[str] = set()

    def check(self, resources: JobResources) -> Sequence[FieldViolation]:
        return [FieldViolation(field="spec.resources.image", description="none here")] if resources.image else []

    async def describe(self, run_directory: Path, spec: JobSpec) -> str:
        return f"kind: Job of {run_directory.name}"

    async def launch(self, run_directory: Path, resources: JobResources) -> str:
        self.launched.append(run_directory)
        return f"worker-{len(self.launched)}"

    async def status(self, handle: str) -> WorkerStatus:
        if handle in self.broken:
            raise RuntimeError("the launcher does not know it any more")
        return WorkerStatus(alive=handle not in self.endings, ending=self.endings.get(handle, ""))

    async def stop(self, handle: str) -> None:
        self.stopped.append(handle)

    async def kill(self, handle: str) -> None:
        self.killed.append(handle)
        self.endings[handle] = "was killed"


class FakeValidator:
    async def check(self, kind: JobKind, config: Mapping[str, Any]) -> None:
        if "bad" in config:
            violation = FieldViolation(field="spec.config.bad", description="is no setting of this kind of job")
            raise SteersmanError(Reason.INVALID_FIELD, "spec.config.bad", violations=[violation])


class Fixture:
    """A service, a stub, and a second hand on its database: the worker's."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.launcher = FakeLauncher()
        self.settings: dict[str, Any] = {}
        self._server: RunningServer | None = None
        self._channel: grpc.aio.Channel | None = None

    async def start(self, **settings: Any) -> None:
        self.settings |= settings
        loaded = TrainerSettings(port=0, metrics_port=None, runs_directory=self.runs, **self.settings)
        metrics = Metrics("trainer")
        service = await build(loaded, metrics, launcher=self.launcher, validator=FakeValidator())
        self._server = await start_server(service, loaded, metrics)
        self._channel = grpc.aio.insecure_channel(self._server.address)
        self.stub: Any = trainer_pb2_grpc.TrainerServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self.worker = JobStore(self.runs / DATABASE_FILE)

    async def stop(self) -> None:
        assert self._server is not None
        assert self._channel is not None
        await self._server.stop(5.0)
        await self._channel.close()
        self.worker.close()

    async def create(self, job_id: str = "", **config: Any) -> trainer_pb2.Job:
        request = trainer_pb2.CreateJobRequest(job_id=job_id)
        request.spec.kind = trainer_pb2.JOB_KIND_SFT
        request.spec.config.update(config)
        job: trainer_pb2.Job = (await self.stub.CreateJob(request, timeout=30)).job
        return job

    async def get(self, job_id: str) -> trainer_pb2.Job:
        job: trainer_pb2.Job = (await self.stub.GetJob(trainer_pb2.GetJobRequest(job_id=job_id), timeout=30)).job
        return job

    async def until(self, job_id: str, state: int) -> trainer_pb2.Job:
        async with asyncio.timeout(30):
            while (job := await self.get(job_id)).state != state:
                await asyncio.sleep(0.02)
        return job

    def watch(self, job_id: str, after: int = 0) -> Any:
        request = trainer_pb2.WatchJobRequest(job_id=job_id, after_sequence=after)
        return self.stub.WatchJob(request, timeout=30)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Fixture]:
    fixture = Fixture(tmp_path / "runs")
    await fixture.start()
    yield fixture
    await fixture.stop()


async def refusal(call: Awaitable[Any]) -> SteersmanError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    trailers = dict(caught.value.trailing_metadata() or ())
    details: Any = trailers.get(DETAILS_TRAILER)
    return decode_error(caught.value.code().value[0], caught.value.details() or "", details)


def summary(event: trainer_pb2.WatchJobResponse) -> tuple[int, str]:
    match event.WhichOneof("event"):
        case "state_change":
            return event.sequence, trainer_pb2.JobState.Name(event.state_change.state).removeprefix("JOB_STATE_")
        case "progress":
            return event.sequence, event.progress.message
        case _:
            return event.sequence, f"metrics of step {event.metrics.step}"


async def test_a_job_from_creation_to_success(service: Fixture) -> None:
    job = await service.create("first", steps=3, rate=0.5, nested={"list": [1, "a", None, True]})
    assert job.state == trainer_pb2.JOB_STATE_PENDING
    assert service.launcher.launched == [Path(job.run_directory)]
    assert dict(job.spec.config)["steps"] == 3
    assert service.worker.get("first").spec.config == {
        "steps": 3,
        "rate": 0.5,
        "nested": {"list": [1, "a", None, True]},
    }

    watch = aiter(service.watch("first"))
    seen = [summary(await anext(watch))]
    service.worker.begin("first", "worker-1")
    seen.append(summary(await anext(watch)))
    service.worker.append("first", [JobProgress(step=1, total_steps=3, message="training")])
    seen.append(summary(await anext(watch)))
    service.worker.append("first", [StepMetrics(step=1, values={"loss": float("nan")})])
    seen.append(summary(await anext(watch)))
    service.worker.move("first", JobState.SUCCEEDED)
    seen += [summary(event) async for event in watch]
    assert seen == [
        (1, "PENDING"),
        (2, "RUNNING"),
        (3, "training"),
        (4, "metrics of step 1"),
        (5, "SUCCEEDED"),
    ]
    assert [summary(event) async for event in service.watch("first", after=3)] == seen[3:]
    assert [event async for event in service.watch("first", after=5)] == []
    done = await service.get("first")
    assert done.progress.total_steps == 3
    assert done.num_attempts == 1
    assert done.create_time.ToNanoseconds() <= done.start_time.ToNanoseconds() <= done.end_time.ToNanoseconds()


async def test_bad_requests_name_the_field(service: Fixture) -> None:
    error = await refusal(service.create("Upper_Case"))
    assert error.reason is Reason.INVALID_FIELD
    assert error.violations[0].field == "job_id"
    error = await refusal(service.create(bad=1))
    assert error.violations[0].field == "spec.config.bad"
    error = await refusal(service.stub.CreateJob(trainer_pb2.CreateJobRequest(), timeout=30))
    assert error.violations[0].field == "spec.kind"
    request = trainer_pb2.CreateJobRequest()
    request.spec.kind = trainer_pb2.JOB_KIND_PPO
    request.spec.resources.image = "x"
    error = await refusal(service.stub.CreateJob(request, timeout=30))
    assert error.violations[0].field == "spec.resources.image"
    for bad in (
        trainer_pb2.ListJobsRequest(page_size=-1),
        trainer_pb2.ListJobsRequest(page_token="yesterday"),
        trainer_pb2.ListJobsRequest(states=[77]),  # type: ignore[list-item]
    ):
        assert (await refusal(service.stub.ListJobs(bad, timeout=30))).reason is Reason.INVALID_FIELD
    error = await refusal(service.watch("x", after=-1).read())
    assert error.violations[0].field == "after_sequence"
    assert service.launcher.launched == []
    assert list(service.runs.glob("*/")) == []


async def test_validate_only_starts_nothing(service: Fixture) -> None:
    request = trainer_pb2.CreateJobRequest(validate_only=True)
    request.spec.kind = trainer_pb2.JOB_KIND_REWARD_MODEL
    job = (await service.stub.CreateJob(request, timeout=30)).job
    assert job.id.startswith("reward-model-")
    assert service.launcher.launched == []
    assert (await refusal(service.get(job.id))).reason is Reason.NOT_FOUND


async def test_names_are_taken_once(service: Fixture) -> None:
    await service.create("same")
    assert (await refusal(service.create("same"))).reason is Reason.ALREADY_EXISTS
    (service.runs / "by-hand").mkdir()
    assert (await refusal(service.create("by-hand"))).reason is Reason.ALREADY_EXISTS
    assert len(service.launcher.launched) == 1


async def test_unknown_jobs_are_not_found(service: Fixture) -> None:
    for call in (
        service.get("nobody"),
        service.watch("nobody").read(),
        service.stub.CancelJob(trainer_pb2.CancelJobRequest(job_id="nobody"), timeout=30),
        service.stub.ResumeJob(trainer_pb2.ResumeJobRequest(job_id="nobody"), timeout=30),
    ):
        assert (await refusal(call)).reason is Reason.NOT_FOUND


async def test_a_full_service_says_when_to_come_back(tmp_path: Path) -> None:
    service = Fixture(tmp_path)
    await service.start(max_running_jobs=1)
    await service.create("one")
    error = await refusal(service.create("two"))
    assert error.reason is Reason.QUEUE_FULL
    assert error.retry_after_seconds
    assert not (tmp_path / "two").exists()
    await service.stop()


async def test_lists_page_newest_first(service: Fixture) -> None:
    for name in ("a", "b", "c"):
        await service.create(name)
    service.worker.move("b", JobState.FAILED, error="x")
    first = await service.stub.ListJobs(trainer_pb2.ListJobsRequest(page_size=2), timeout=30)
    assert [job.id for job in first.jobs] == ["c", "b"]
    rest = await service.stub.ListJobs(
        trainer_pb2.ListJobsRequest(page_size=2, page_token=first.next_page_token), timeout=30
    )
    assert [job.id for job in rest.jobs] == ["a"]
    assert rest.next_page_token == ""
    failed = trainer_pb2.ListJobsRequest(states=[trainer_pb2.JOB_STATE_FAILED])
    assert [job.id for job in (await service.stub.ListJobs(failed, timeout=30)).jobs] == ["b"]


async def test_cancel_stops_the_worker_and_waits_for_its_checkpoint(service: Fixture) -> None:
    await service.create("one")
    service.worker.begin("one", "worker-1")
    request = trainer_pb2.CancelJobRequest(job_id="one")
    job = (await service.stub.CancelJob(request, timeout=30)).job
    assert job.state == trainer_pb2.JOB_STATE_CANCELLING
    assert "worker-1" in service.launcher.stopped
    assert (await service.stub.CancelJob(request, timeout=30)).job.state == trainer_pb2.JOB_STATE_CANCELLING
    service.worker.move("one", JobState.CANCELLED)
    assert (await refusal(service.stub.CancelJob(request, timeout=30))).reason is Reason.JOB_STATE
    assert service.launcher.killed == []


async def test_a_worker_that_will_not_stop_is_killed(tmp_path: Path) -> None:
    service = Fixture(tmp_path)
    await service.start(cancel_grace_seconds=0.0)
    await service.create("one")
    await service.stub.CancelJob(trainer_pb2.CancelJobRequest(job_id="one"), timeout=30)
    await service.until("one", trainer_pb2.JOB_STATE_CANCELLED)
    assert service.launcher.killed == ["worker-1"]
    await service.stop()


async def test_a_dead_worker_fails_its_job_with_the_end_of_its_log(service: Fixture) -> None:
    job = await service.create("one")
    service.worker.begin("one", "worker-1")
    (Path(job.run_directory) / "log.txt").write_text("loading\nout of memory\n")
    service.launcher.endings["worker-1"] = "was killed by SIGKILL"
    failed = await service.until("one", trainer_pb2.JOB_STATE_FAILED)
    assert "was killed by SIGKILL" in failed.error
    assert "out of memory" in failed.error
    last = [event async for event in service.watch("one")][-1]
    assert last.state_change.error == failed.error

    resumed = (await service.stub.ResumeJob(trainer_pb2.ResumeJobRequest(job_id="one"), timeout=30)).job
    assert resumed.state == trainer_pb2.JOB_STATE_PENDING
    assert resumed.error == ""
    assert service.launcher.launched == [Path(job.run_directory)] * 2
    again = service.stub.ResumeJob(trainer_pb2.ResumeJobRequest(job_id="one"), timeout=30)
    assert (await refusal(again)).reason is Reason.JOB_STATE


async def test_a_dead_worker_is_started_again_as_often_as_the_settings_say(tmp_path: Path) -> None:
    service = Fixture(tmp_path)
    await service.start(max_attempts=2)
    await service.create("one")
    service.worker.begin("one", "worker-1")
    service.launcher.endings["worker-1"] = "was killed by SIGKILL"
    async with asyncio.timeout(30):
        while len(service.launcher.launched) < 2:
            await asyncio.sleep(0.02)
    service.worker.begin("one", "worker-2")
    service.launcher.endings["worker-2"] = "was killed by SIGKILL"
    failed = await service.until("one", trainer_pb2.JOB_STATE_FAILED)
    assert failed.num_attempts == 2
    states = [
        trainer_pb2.JobState.Name(event.state_change.state).removeprefix("JOB_STATE_")
        async for event in service.watch("one")
    ]
    assert states == ["PENDING", "RUNNING", "PENDING", "RUNNING", "FAILED"]
    await service.stop()


async def test_jobs_outlive_the_service(service: Fixture) -> None:
    await service.create("one")
    service.worker.begin("one", "worker-1")
    watch = service.watch("one", after=1)
    await watch.read()  # so the service has the call
    waiting = asyncio.create_task(watch.read())
    await service.stop()
    error = await refusal(waiting)
    assert error.reason is Reason.ENGINE_UNAVAILABLE
    await service.start()
    assert (await service.get("one")).state == trainer_pb2.JOB_STATE_RUNNING
    service.worker.move("one", JobState.SUCCEEDED)
    assert [summary(event) async for event in service.watch("one", after=2)] == [(3, "SUCCEEDED")]
    assert len(service.launcher.launched) == 1


async def test_a_job_that_was_accepted_but_not_started_is_started_by_the_next_service(service: Fixture) -> None:
    await service.create("one")
    await service.stop()
    store = JobStore(service.runs / DATABASE_FILE)
    store.move("one", JobState.FAILED)
    store.restart("one", expected={JobState.FAILED}, restarts_left=0, max_active=9)
    store.close()
    await service.start()
    assert len(service.launcher.launched) == 2


async def test_a_watcher_that_leaves_is_forgotten(service: Fixture) -> None:
    await service.create("one")
    watch = service.watch("one", after=1)
    reading = asyncio.create_task(watch.read())
    await asyncio.sleep(0)
    watch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    service.worker.begin("one", "worker-1")
    events = service.watch("one", after=1)
    assert summary(await events.read()) == (2, "RUNNING")
    events.cancel()


async def test_watching_from_beyond_the_last_event_is_a_bad_field(service: Fixture) -> None:
    await service.create("one")
    error = await refusal(service.watch("one", after=2).read())
    assert error.message == "after_sequence is 2, allowed: 0 to 1, the last event of 'one'"


async def test_long_specs_are_refused_and_pages_of_them_stay_short(service: Fixture) -> None:
    error = await refusal(service.create("long", text="x" * MAX_SPEC_BYTES))
    assert error.message.startswith("spec is '262")
    assert error.message.endswith(f"bytes as JSON', allowed: at most {MAX_SPEC_BYTES}")
    assert not (service.runs / "long").exists()


async def test_no_trouble_with_one_job_keeps_others_waiting(service: Fixture) -> None:
    await service.create("orphan")
    lost = service.runs / "lost"
    spec = JobSpec(kind=JobKind.SFT, config={})
    job = Job(id="lost", spec=spec, state=JobState.PENDING, run_directory=str(lost), create_time=0.0)
    service.worker.create(job, max_active=9)
    failed = await service.until("lost", trainer_pb2.JOB_STATE_FAILED)
    assert failed.error == "its run folder cannot be used: No such file or directory"
    service.launcher.broken.add("worker-1")
    assert (await service.create("next")).state == trainer_pb2.JOB_STATE_PENDING
    assert len(service.launcher.launched) == 2


async def test_a_full_disk_is_said_and_leaves_nothing_behind(service: Fixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        error = await refusal(service.create("full"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.code is Code.UNAVAILABLE
    assert error.message == "the runs directory of the service cannot be written to: File too large"
    assert not (service.runs / "full").exists()
    await service.create("full")
