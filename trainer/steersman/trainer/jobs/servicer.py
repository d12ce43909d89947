"""TrainerService: convert, call the handler, convert."""

from collections.abc import AsyncGenerator
from typing import Any

import grpc

from steersman.trainer.jobs import convert
from steersman.trainer.jobs.handler import JobsHandler
from steersman.trainer.jobs.launcher import LogPart
from steersman.v1 import trainer_pb2, trainer_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """See trainer.proto for what each method does."""

    def __init__(self, handler: JobsHandler) -> None:
        self._handler = handler

    async def CreateJob(  # type: ignore[override]  # noqa: N802
        self, request: trainer_pb2.CreateJobRequest, context: Context
    ) -> trainer_pb2.CreateJobResponse:
        """Checks a job and starts it."""
        spec = convert.spec_from_proto(request.spec)
        job = await self._handler.create(request.job_id, spec, validate_only=request.validate_only)
        objects = await self._handler.describe(job) if request.validate_only else ""
        return trainer_pb2.CreateJobResponse(job=convert.job_to_proto(job), objects_yaml=objects)

    async def GetJob(  # type: ignore[override]  # noqa: N802
        self, request: trainer_pb2.GetJobRequest, context: Context
    ) -> trainer_pb2.GetJobResponse:
        """Returns one job."""
        job = await self._handler.get(request.job_id)
        return trainer_pb2.GetJobResponse(job=convert.job_to_proto(job))

    async def ListJobs(  # type: ignore[override]  # noqa: N802
        self, request: trainer_pb2.ListJobsRequest, context: Context
    ) -> trainer_pb2.ListJobsResponse:
        """Lists jobs, newest first."""
        states = convert.states_from_proto(request.states)
        jobs, token = await self._handler.list_page(
            page_size=request.page_size, page_token=request.page_token, states=states
        )
        return trainer_pb2.ListJobsResponse(jobs=map(convert.job_to_proto, jobs), next_page_token=token)

    async def CancelJob(  # type: ignore[override]  # noqa: N802
        self, request: trainer_pb2.CancelJobRequest, context: Context
    ) -> trainer_pb2.CancelJobResponse:
        """Asks a job to stop."""
        job = await self._handler.cancel(request.job_id)
        return trainer_pb2.CancelJobResponse(job=convert.job_to_proto(job))

    async def ResumeJob(  # type: ignore[override]  # noqa: N802
        self, request: trainer_pb2.ResumeJobRequest, context: Context
    ) -> trainer_pb2.ResumeJobResponse:
        """Starts an ended job again from its last checkpoint."""
        job = await self._handler.resume(request.job_id)
        return trainer_pb2.ResumeJobResponse(job=convert.job_to_proto(job))

    async def WatchJob(  # type: ignore[override]  # noqa: N802
        self, request: trainer_pb2.WatchJobRequest, context: Context
    ) -> AsyncGenerator[trainer_pb2.WatchJobResponse, None]:
        """Streams the events of a job until it ends."""
        async for event in self._handler.watch(request.job_id, request.after_sequence):
            yield convert.event_to_proto(event)

    async def ReadJobLogs(  # type: ignore[override]  # noqa: N802
        self, request: trainer_pb2.ReadJobLogsRequest, context: Context
    ) -> trainer_pb2.ReadJobLogsResponse:
        """Returns lines that a job's worker has printed."""
        part = LogPart(cursor=request.page_token, tail_lines=request.tail_lines, node=request.node)
        log, ended = await self._handler.read_log(request.job_id, part)
        return trainer_pb2.ReadJobLogsResponse(lines=log.lines, next_page_token=log.cursor, ended=ended)
