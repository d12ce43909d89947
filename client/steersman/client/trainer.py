"""Clients of the trainer service: start, list, stop and watch training jobs.

`watch_job` outlives disconnects: it goes on after the last event that it saw, so each event comes exactly once.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from datetime import UTC, datetime
from typing import Any, Final

from steersman.client.calls import AsyncClient, Client
from steersman.client.prompts import from_struct, to_struct
from steersman.client.types import (
    Job,
    JobEvent,
    JobKind,
    JobProgress,
    JobResources,
    JobState,
    StateChange,
    StepMetrics,
)
from steersman.v1 import trainer_pb2, trainer_pb2_grpc
from steersman.wire.errors import Code, SteersmanError, invalid_field

_STATE: Final = {
    trainer_pb2.JOB_STATE_PENDING: JobState.PENDING,
    trainer_pb2.JOB_STATE_RUNNING: JobState.RUNNING,
    trainer_pb2.JOB_STATE_CANCELLING: JobState.CANCELLING,
    trainer_pb2.JOB_STATE_SUCCEEDED: JobState.SUCCEEDED,
    trainer_pb2.JOB_STATE_FAILED: JobState.FAILED,
    trainer_pb2.JOB_STATE_CANCELLED: JobState.CANCELLED,
}
_STATE_TO_PROTO: Final = {state: value for value, state in _STATE.items()}
_KIND: Final = {
    trainer_pb2.JOB_KIND_SFT: JobKind.SFT,
    trainer_pb2.JOB_KIND_REWARD_MODEL: JobKind.REWARD_MODEL,
    trainer_pb2.JOB_KIND_PPO: JobKind.PPO,
}
_KIND_TO_PROTO: Final = {kind: value for value, kind in _KIND.items()}
_PAGE_SIZE: Final = 100

# A watch that heard nothing for so long asks anew, so that a half-open connection is noticed.
_WATCH_STREAM_SECONDS: Final = 3600.0
_MAX_BACKOFF_SECONDS: Final = 3.0
# Between two questions for lines of a log that has nothing new.
_LOG_SECONDS: Final = 1.0
# A stream that lived so long was connected; its loss begins a new time of grace.
_HEALTHY_SECONDS: Final = 10.0


def create_request(
    kind: JobKind | str,
    config: Mapping[str, Any],
    job_id: str | None,
    resources: JobResources | None,
    validate_only: bool,
) -> trainer_pb2.CreateJobRequest:
    """The request for a job. Raises INVALID_FIELD for an unknown kind or what JSON cannot hold."""
    try:
        known = JobKind(kind)
    except ValueError:
        raise invalid_field("kind", kind, ", ".join(JobKind)) from None
    spec = trainer_pb2.JobSpec(kind=_KIND_TO_PROTO[known], config=to_struct(config, "config"))
    if resources is not None:
        spec.resources.CopyFrom(
            trainer_pb2.JobResources(
                num_processes=resources.num_processes,
                gpus_per_process=resources.gpus_per_process,
                cpus_per_process=resources.cpus_per_process,
                memory_bytes_per_process=resources.memory_bytes_per_process,
                queue_name=resources.queue_name,
                labels=dict(resources.labels),
                image=resources.image,
                processes_per_node=resources.processes_per_node,
            )
        )
    return trainer_pb2.CreateJobRequest(job_id=job_id or "", spec=spec, validate_only=validate_only)


def _time(message: Any, field: str) -> datetime | None:
    return getattr(message, field).ToDatetime(tzinfo=UTC) if message.HasField(field) else None


def _known_state(value: trainer_pb2.JobState) -> JobState:
    if value not in _STATE:
        raise SteersmanError(None, f"the server sent an unknown job state ({value})", code=Code.DATA_LOSS)
    return _STATE[value]


def _progress(message: trainer_pb2.JobProgress) -> JobProgress:
    return JobProgress(step=message.step, total_steps=message.total_steps, message=message.message)


def job_from_proto(message: trainer_pb2.Job) -> Job:
    """The job of a message."""
    if message.spec.kind not in _KIND:
        raise SteersmanError(None, f"the server sent an unknown job kind ({message.spec.kind})", code=Code.DATA_LOSS)
    resources = message.spec.resources
    return Job(
        id=message.id,
        kind=_KIND[message.spec.kind],
        config=from_struct(message.spec.config),
        resources=JobResources(
            num_processes=resources.num_processes or 1,
            gpus_per_process=resources.gpus_per_process,
            cpus_per_process=resources.cpus_per_process,
            memory_bytes_per_process=resources.memory_bytes_per_process,
            queue_name=resources.queue_name,
            labels=dict(resources.labels),
            image=resources.image,
            processes_per_node=resources.processes_per_node,
        ),
        state=_known_state(message.state),
        progress=_progress(message.progress),
        run_directory=message.run_directory,
        error=message.error,
        create_time=_time(message, "create_time"),
        start_time=_time(message, "start_time"),
        end_time=_time(message, "end_time"),
        num_attempts=message.num_attempts,
    )


def event_from_proto(message: trainer_pb2.WatchJobResponse) -> JobEvent | None:
    """The event of a message; None for a kind of event that this client does not know yet."""
    event: StateChange | JobProgress | StepMetrics
    match message.WhichOneof("event"):
        case "state_change":
            change = message.state_change
            event = StateChange(state=_known_state(change.state), error=change.error)
        case "progress":
            event = _progress(message.progress)
        case "metrics":
            event = StepMetrics(step=message.metrics.step, values=dict(message.metrics.values))
        case _:
            return None
    return JobEvent(sequence=message.sequence, time=message.event_time.ToDatetime(tzinfo=UTC), event=event)


class WatchCursor:
    """Where a watch stands: the last event seen, and whether a lost stream is to be taken up again.

    Invariant: `accept` lets each sequence number through at most once, ascending.
    """

    def __init__(
        self,
        job_id: str,
        after_sequence: int,
        reconnect_seconds: float,
        on_disconnect: Callable[[SteersmanError], None] | None,
    ) -> None:
        self._job_id = job_id
        self._last = after_sequence
        self._reconnect_seconds = reconnect_seconds
        self._on_disconnect = on_disconnect
        self._opened = 0.0
        self._failing_since: float | None = None
        self._num_failures = 0

    def request(self) -> trainer_pb2.WatchJobRequest:
        """The request that goes on where the watch stands."""
        self._opened = time.monotonic()
        return trainer_pb2.WatchJobRequest(job_id=self._job_id, after_sequence=self._last)

    def accept(self, message: trainer_pb2.WatchJobResponse) -> JobEvent | None:
        """The event, or None if it was seen before or is of an unknown kind."""
        self._failing_since, self._num_failures = None, 0
        if message.sequence <= self._last:
            return None
        self._last = message.sequence
        return event_from_proto(message)

    def backoff(self, error: SteersmanError) -> float:
        """Seconds to wait before the next try; raises `error` if the watch cannot go on."""
        now = time.monotonic()
        if error.code == Code.DEADLINE_EXCEEDED and error.reason is None:
            return 0.0  # our own limit of one stream
        if error.code not in (Code.UNAVAILABLE, Code.CANCELLED):
            raise error
        if self._failing_since is None or now - self._opened > _HEALTHY_SECONDS:
            self._failing_since, self._num_failures = now, 0
        if now - self._failing_since >= self._reconnect_seconds:
            raise error
        if self._on_disconnect is not None:
            self._on_disconnect(error)
        self._num_failures += 1
        return min(0.1 * 2.0**self._num_failures, _MAX_BACKOFF_SECONDS) * random.uniform(0.5, 1.0)


class AsyncTrainerClient(AsyncClient):
    """Asyncio client of the trainer service. Calls have 60 s unless `timeout` says otherwise."""

    default_timeout = 60.0
    _stub_type = trainer_pb2_grpc.TrainerServiceStub

    async def create_job(
        self,
        kind: JobKind | str,
        config: Mapping[str, Any],
        *,
        job_id: str | None = None,
        resources: JobResources | None = None,
        validate_only: bool = False,
        timeout: float | None = None,
    ) -> Job:
        """Checks the settings and starts a job ("sft", "reward_model" or "ppo").

        Args:
            config: settings of the kind, JSON values only.
            job_id: lower-case letters, digits and hyphens, at most 63; the server chooses one if None.
            validate_only: check the settings, start nothing.

        Raises INVALID_FIELD with a violation for each bad setting.
        """
        request = create_request(kind, config, job_id, resources, validate_only)
        return job_from_proto((await self._call(self._stub.CreateJob, request, timeout)).job)

    async def preview_job(
        self,
        kind: JobKind | str,
        config: Mapping[str, Any],
        *,
        job_id: str | None = None,
        resources: JobResources | None = None,
        timeout: float | None = None,
    ) -> str:
        """Checks the settings, starts nothing, and returns the Kubernetes objects that `create_job` would make, as
        YAML; empty where jobs are processes. Raises what `create_job` does.
        """
        request = create_request(kind, config, job_id, resources, validate_only=True)
        response = await self._call(self._stub.CreateJob, request, timeout)
        return str(response.objects_yaml)

    async def get_job(self, job_id: str, *, timeout: float | None = None) -> Job:
        """The job. Raises NOT_FOUND."""
        request = trainer_pb2.GetJobRequest(job_id=job_id)
        return job_from_proto((await self._call(self._stub.GetJob, request, timeout)).job)

    async def list_jobs(
        self, *, states: Sequence[JobState] = (), timeout: float | None = None
    ) -> AsyncGenerator[Job, None]:
        """All jobs, or those in `states`, newest first, page by page. `timeout` holds for each page."""
        request = trainer_pb2.ListJobsRequest(page_size=_PAGE_SIZE, states=[_STATE_TO_PROTO[state] for state in states])
        while True:
            page = await self._call(self._stub.ListJobs, request, timeout)
            for job in page.jobs:
                yield job_from_proto(job)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def cancel_job(self, job_id: str, *, timeout: float | None = None) -> Job:
        """Asks a job to write a checkpoint and stop. Raises NOT_FOUND, JOB_STATE."""
        request = trainer_pb2.CancelJobRequest(job_id=job_id)
        return job_from_proto((await self._call(self._stub.CancelJob, request, timeout)).job)

    async def resume_job(self, job_id: str, *, timeout: float | None = None) -> Job:
        """Starts a failed or cancelled job again from its last checkpoint. Raises NOT_FOUND, JOB_STATE."""
        request = trainer_pb2.ResumeJobRequest(job_id=job_id)
        return job_from_proto((await self._call(self._stub.ResumeJob, request, timeout)).job)

    async def job_logs(
        self,
        job_id: str,
        *,
        follow: bool = False,
        tail_lines: int | None = None,
        node: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[str, None]:
        """Lines that a job's worker has printed, on a node where the job has several.

        Args:
            follow: go on until the job has ended.
            tail_lines: only so many of the last lines that are there now.
            timeout: of each question.
        """
        request = trainer_pb2.ReadJobLogsRequest(job_id=job_id, tail_lines=tail_lines or 0, node=node)
        while True:
            page = await self._call(self._stub.ReadJobLogs, request, timeout)
            for line in page.lines:
                yield line
            if page.ended or not (follow or page.lines):
                return
            request.page_token = page.next_page_token
            if not page.lines:
                await asyncio.sleep(_LOG_SECONDS)

    async def watch_job(
        self,
        job_id: str,
        *,
        after_sequence: int = 0,
        reconnect_seconds: float = 300.0,
        on_disconnect: Callable[[SteersmanError], None] | None = None,
    ) -> AsyncGenerator[JobEvent, None]:
        """Events of a job after `after_sequence`, until it ends; each exactly once, whatever the connection does.

        Args:
            reconnect_seconds: the watch fails when the service was away for so long without a break.
            on_disconnect: hears of each lost connection and failed try, for a line to the user.
        """
        cursor = WatchCursor(job_id, after_sequence, reconnect_seconds, on_disconnect)
        while True:
            responses = self._stream(self._stub.WatchJob, cursor.request(), _WATCH_STREAM_SECONDS)
            try:
                async with aclosing(responses):
                    async for response in responses:
                        if (event := cursor.accept(response)) is not None:
                            yield event
                return
            except SteersmanError as error:
                delay = cursor.backoff(error)
            await asyncio.sleep(delay)


class TrainerClient(Client):
    """Blocking client of the trainer service. Calls have 60 s unless `timeout` says otherwise."""

    default_timeout = 60.0
    _stub_type = trainer_pb2_grpc.TrainerServiceStub

    def create_job(
        self,
        kind: JobKind | str,
        config: Mapping[str, Any],
        *,
        job_id: str | None = None,
        resources: JobResources | None = None,
        validate_only: bool = False,
        timeout: float | None = None,
    ) -> Job:
        """Checks the settings and starts a job; as `AsyncTrainerClient.create_job`."""
        request = create_request(kind, config, job_id, resources, validate_only)
        return job_from_proto(self._call(self._stub.CreateJob, request, timeout).job)

    def preview_job(
        self,
        kind: JobKind | str,
        config: Mapping[str, Any],
        *,
        job_id: str | None = None,
        resources: JobResources | None = None,
        timeout: float | None = None,
    ) -> str:
        """The objects that a job would make; as `AsyncTrainerClient.preview_job`."""
        request = create_request(kind, config, job_id, resources, validate_only=True)
        return str(self._call(self._stub.CreateJob, request, timeout).objects_yaml)

    def get_job(self, job_id: str, *, timeout: float | None = None) -> Job:
        """The job. Raises NOT_FOUND."""
        request = trainer_pb2.GetJobRequest(job_id=job_id)
        return job_from_proto(self._call(self._stub.GetJob, request, timeout).job)

    def list_jobs(self, *, states: Sequence[JobState] = (), timeout: float | None = None) -> Generator[Job, None, None]:
        """All jobs, or those in `states`, newest first, page by page. `timeout` holds for each page."""
        request = trainer_pb2.ListJobsRequest(page_size=_PAGE_SIZE, states=[_STATE_TO_PROTO[state] for state in states])
        while True:
            page = self._call(self._stub.ListJobs, request, timeout)
            yield from map(job_from_proto, page.jobs)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def cancel_job(self, job_id: str, *, timeout: float | None = None) -> Job:
        """Asks a job to write a checkpoint and stop. Raises NOT_FOUND, JOB_STATE."""
        request = trainer_pb2.CancelJobRequest(job_id=job_id)
        return job_from_proto(self._call(self._stub.CancelJob, request, timeout).job)

    def resume_job(self, job_id: str, *, timeout: float | None = None) -> Job:
        """Starts a failed or cancelled job again from its last checkpoint. Raises NOT_FOUND, JOB_STATE."""
        request = trainer_pb2.ResumeJobRequest(job_id=job_id)
        return job_from_proto(self._call(self._stub.ResumeJob, request, timeout).job)

    def job_logs(
        self,
        job_id: str,
        *,
        follow: bool = False,
        tail_lines: int | None = None,
        node: int = 0,
        timeout: float | None = None,
    ) -> Generator[str, None, None]:
        """Lines that a job's worker has printed; as `AsyncTrainerClient.job_logs`."""
        request = trainer_pb2.ReadJobLogsRequest(job_id=job_id, tail_lines=tail_lines or 0, node=node)
        while True:
            page = self._call(self._stub.ReadJobLogs, request, timeout)
            yield from page.lines
            if page.ended or not (follow or page.lines):
                return
            request.page_token = page.next_page_token
            if not page.lines:
                time.sleep(_LOG_SECONDS)

    def watch_job(
        self,
        job_id: str,
        *,
        after_sequence: int = 0,
        reconnect_seconds: float = 300.0,
        on_disconnect: Callable[[SteersmanError], None] | None = None,
    ) -> Generator[JobEvent, None, None]:
        """Events of a job until it ends; as `AsyncTrainerClient.watch_job`."""
        cursor = WatchCursor(job_id, after_sequence, reconnect_seconds, on_disconnect)
        while True:
            responses = self._stream(self._stub.WatchJob, cursor.request(), _WATCH_STREAM_SECONDS)
            try:
                with closing(responses):
                    for response in responses:
                        if (event := cursor.accept(response)) is not None:
                            yield event
                return
            except SteersmanError as error:
                delay = cursor.backoff(error)
            time.sleep(delay)
