"""The trainer client against a server: jobs, pages, and a watch that outlives disconnects."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from steersman.client import (
    AsyncTrainerClient,
    JobKind,
    JobProgress,
    JobResources,
    JobState,
    StateChange,
    StepMetrics,
    TrainerClient,
)
from steersman.v1 import trainer_pb2, trainer_pb2_grpc
from steersman.wire.errors import Code, Reason, SteersmanError, not_found, unavailable

ADD = trainer_pb2_grpc.add_TrainerServiceServicer_to_server


def event(sequence: int) -> trainer_pb2.WatchJobResponse:
    """Start, progress, metrics of steps, end."""
    message = trainer_pb2.WatchJobResponse(sequence=sequence)
    message.event_time.FromDatetime(datetime(2026, 1, 1, tzinfo=UTC))
    if sequence == 1:
        message.state_change.state = trainer_pb2.JOB_STATE_RUNNING
    elif sequence == 6:
        message.state_change.state = trainer_pb2.JOB_STATE_SUCCEEDED
    elif sequence % 2 == 0:
        message.progress.CopyFrom(trainer_pb2.JobProgress(step=sequence, total_steps=6, message="waits for policy"))
    else:
        message.metrics.CopyFrom(trainer_pb2.StepMetrics(step=sequence, values={"objective/kl": 0.5}))
    return message


class FakeTrainer(trainer_pb2_grpc.TrainerServiceServicer):
    """Three jobs on pages of two, and a watch of six events; `breaks` says after how many events a stream is lost."""

    def __init__(self, refuse: Any) -> None:
        self.refuse = refuse
        self.created: list[trainer_pb2.CreateJobRequest] = []
        self.pages: list[trainer_pb2.ListJobsRequest] = []
        self.watched_from: list[int] = []
        self.breaks: list[tuple[int, SteersmanError]] = []

    def job(self, job_id: str) -> trainer_pb2.Job:
        job = trainer_pb2.Job(id=job_id, state=trainer_pb2.JOB_STATE_RUNNING, run_directory=f"runs/{job_id}")
        job.spec.kind = trainer_pb2.JOB_KIND_PPO
        job.create_time.FromDatetime(datetime(2026, 1, 1, tzinfo=UTC))
        return job

    async def CreateJob(self, request: trainer_pb2.CreateJobRequest, context: Any) -> trainer_pb2.CreateJobResponse:
        self.created.append(request)
        job = self.job(request.job_id or "chosen")
        job.spec.CopyFrom(request.spec)
        return trainer_pb2.CreateJobResponse(job=job)

    async def GetJob(self, request: Any, context: Any) -> trainer_pb2.GetJobResponse:
        if request.job_id == "nobody":
            await self.refuse(context, not_found("job", "nobody"))
        return trainer_pb2.GetJobResponse(job=self.job(request.job_id))

    async def ListJobs(self, request: trainer_pb2.ListJobsRequest, context: Any) -> trainer_pb2.ListJobsResponse:
        self.pages.append(trainer_pb2.ListJobsRequest.FromString(request.SerializeToString()))
        if not request.page_token:
            return trainer_pb2.ListJobsResponse(jobs=[self.job("c"), self.job("b")], next_page_token="next")
        return trainer_pb2.ListJobsResponse(jobs=[self.job("a")])

    async def CancelJob(self, request: Any, context: Any) -> trainer_pb2.CancelJobResponse:
        job = self.job(request.job_id)
        job.state = trainer_pb2.JOB_STATE_CANCELLING
        return trainer_pb2.CancelJobResponse(job=job)

    async def ResumeJob(self, request: Any, context: Any) -> trainer_pb2.ResumeJobResponse:
        await self.refuse(context, SteersmanError(Reason.JOB_STATE, "the job is running"))

    async def WatchJob(self, request: trainer_pb2.WatchJobRequest, context: Any) -> Any:
        self.watched_from.append(request.after_sequence)
        last, error = self.breaks.pop(0) if self.breaks else (6, None)
        # Begins one too early, as a server that counts otherwise might: the client must not show it twice.
        for sequence in range(max(request.after_sequence, 1), last + 1):
            yield event(sequence)
        if error is not None:
            await self.refuse(context, error)


@pytest.fixture
def fake(refuse: Any) -> FakeTrainer:
    return FakeTrainer(refuse)


async def test_create_sends_the_settings_as_they_are(fake: FakeTrainer, serve: Any) -> None:
    config = {"steps": 3, "lr": 1e-5, "policy": {"addresses": ["a:1", "b:2"], "wait": None}, "whiten": True}
    async with AsyncTrainerClient(await serve(ADD, fake)) as client:
        job = await client.create_job("ppo", config, job_id="my-job", resources=JobResources(num_processes=2))
        assert await client.create_job(JobKind.SFT, {}, validate_only=True)
    assert job.id == "my-job"
    assert job.kind is JobKind.PPO
    assert job.config == config
    assert isinstance(job.config["steps"], int)
    assert job.resources.num_processes == 2
    assert job.create_time == datetime(2026, 1, 1, tzinfo=UTC)
    assert job.end_time is None
    assert [request.validate_only for request in fake.created] == [False, True]


@pytest.mark.parametrize(
    ("kind", "config", "field"),
    [
        ("dpo", {}, "kind"),
        ("ppo", {"a": {"b": [1, object()]}}, r"config\.a\.b\[1\]"),
        ("ppo", {"lr": float("nan")}, r"config\.lr"),
        ("ppo", {"seed": 2**60}, r"config\.seed"),
        ("ppo", {1: "x"}, "config"),
    ],
)
async def test_settings_that_cannot_travel_are_refused_here(kind: str, config: Any, field: str) -> None:
    async with AsyncTrainerClient("127.0.0.1:1") as client:
        with pytest.raises(SteersmanError, match=field) as caught:
            await client.create_job(kind, config)
    assert caught.value.reason is Reason.INVALID_FIELD


async def test_list_reads_all_pages(fake: FakeTrainer, serve: Any) -> None:
    async with AsyncTrainerClient(await serve(ADD, fake)) as client:
        assert [job.id async for job in client.list_jobs(states=[JobState.RUNNING])] == ["c", "b", "a"]
    assert [page.page_token for page in fake.pages] == ["", "next"]
    assert all(list(page.states) == [trainer_pb2.JOB_STATE_RUNNING] for page in fake.pages)


async def test_get_cancel_and_resume(fake: FakeTrainer, serve: Any) -> None:
    async with AsyncTrainerClient(await serve(ADD, fake)) as client:
        assert (await client.get_job("a")).run_directory == "runs/a"
        assert (await client.cancel_job("a")).state is JobState.CANCELLING
        with pytest.raises(SteersmanError) as missing:
            await client.get_job("nobody")
        with pytest.raises(SteersmanError) as running:
            await client.resume_job("a")
    assert missing.value.reason is Reason.NOT_FOUND
    assert running.value.reason is Reason.JOB_STATE


async def test_watch_brings_each_event_once_through_disconnects(fake: FakeTrainer, serve: Any) -> None:
    fake.breaks = [
        (2, unavailable("restarting")),
        (2, SteersmanError(Reason.CANCELLED, "shutting down")),
        (5, unavailable("restarting")),
    ]
    lost: list[SteersmanError] = []
    async with AsyncTrainerClient(await serve(ADD, fake)) as client:
        events = [event async for event in client.watch_job("a", on_disconnect=lost.append)]
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5, 6]
    assert fake.watched_from == [0, 2, 2, 5]
    assert len(lost) == 3
    assert events[0].event == StateChange(state=JobState.RUNNING)
    assert events[1].event == JobProgress(step=2, total_steps=6, message="waits for policy")
    assert events[2].event == StepMetrics(step=3, values={"objective/kl": 0.5})
    assert events[5].event == StateChange(state=JobState.SUCCEEDED)


async def test_watch_goes_on_when_the_server_comes_back(fake: FakeTrainer, serve: Any, refuse: Any) -> None:
    port = int((await serve(ADD, fake)).rpartition(":")[2])
    fake.breaks = [(3, unavailable("going down"))]
    sequences: list[int] = []
    async with AsyncTrainerClient(f"127.0.0.1:{port}") as client, asyncio.timeout(30):
        async for seen in client.watch_job("a", after_sequence=1):
            sequences.append(seen.sequence)
    assert sequences == [2, 3, 4, 5, 6]


async def test_watch_gives_up_in_the_end_and_at_once_on_other_errors(fake: FakeTrainer, serve: Any) -> None:
    fake.breaks = [(0, not_found("job", "a"))]
    async with AsyncTrainerClient(await serve(ADD, fake)) as client:
        with pytest.raises(SteersmanError) as caught:
            await anext(client.watch_job("a"))
    assert caught.value.reason is Reason.NOT_FOUND
    assert len(fake.watched_from) == 1
    async with AsyncTrainerClient("127.0.0.1:1") as client:
        with pytest.raises(SteersmanError) as away:
            await anext(client.watch_job("a", reconnect_seconds=0.0))
    assert away.value.code is Code.UNAVAILABLE


async def test_the_blocking_client_does_the_same(fake: FakeTrainer, serve: Any) -> None:
    address = await serve(ADD, fake)
    fake.breaks = [(4, unavailable("restarting"))]

    def talk() -> None:
        with TrainerClient(address) as client:
            assert client.create_job("reward_model", {"epochs": 1}).kind is JobKind.REWARD_MODEL
            assert [job.id for job in client.list_jobs()] == ["c", "b", "a"]
            assert client.get_job("a").state is JobState.RUNNING
            assert client.cancel_job("a").state is JobState.CANCELLING
            with pytest.raises(SteersmanError, match="running"):
                client.resume_job("a")
            assert [event.sequence for event in client.watch_job("a")] == [1, 2, 3, 4, 5, 6]

    await asyncio.to_thread(talk)
