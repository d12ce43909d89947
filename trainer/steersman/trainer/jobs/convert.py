"""Job dataclasses to and from the messages of trainer.proto."""

from collections.abc import Iterable
from typing import Any

from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp

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
from steersman.v1 import trainer_pb2
from steersman.wire.errors import invalid_field

_KIND_OF = {int(trainer_pb2.JobKind.Value(f"JOB_KIND_{kind.name}")): kind for kind in JobKind}
_STATE_OF = {int(trainer_pb2.JobState.Value(f"JOB_STATE_{state.name}")): state for state in JobState}


def spec_from_proto(message: trainer_pb2.JobSpec) -> JobSpec:
    """The spec of a request. Errors: INVALID_FIELD for an unspecified or unknown kind, or a config with
    numbers that are not finite."""
    if message.kind not in _KIND_OF:
        raise invalid_field("spec.kind", message.kind, ", ".join(f"JOB_KIND_{kind.name}" for kind in JobKind))
    resources = message.resources
    try:
        config = json_format.MessageToDict(message.config)
    except (ValueError, json_format.SerializeToJsonError) as error:
        raise invalid_field("spec.config", "a number that is not finite", "what JSON can say") from error
    return JobSpec(
        kind=_KIND_OF[message.kind],
        config=_whole_numbers(config),
        resources=JobResources(
            num_processes=resources.num_processes,
            gpus_per_process=resources.gpus_per_process,
            cpus_per_process=resources.cpus_per_process,
            memory_bytes_per_process=resources.memory_bytes_per_process,
            queue_name=resources.queue_name,
            labels=dict(resources.labels),
            image=resources.image,
            processes_per_node=resources.processes_per_node,
        ),
    )


def states_from_proto(values: Iterable[int]) -> frozenset[JobState]:
    """The states of a filter. Errors: INVALID_FIELD for an unknown one."""
    known = list(values)
    for index, value in enumerate(known):
        if value not in _STATE_OF:
            allowed = ", ".join(f"JOB_STATE_{state.name}" for state in JobState)
            raise invalid_field(f"states[{index}]", value, allowed)
    return frozenset(_STATE_OF[value] for value in known)


def job_to_proto(job: Job) -> trainer_pb2.Job:
    """The message of a job."""
    resources = job.spec.resources
    message = trainer_pb2.Job(
        id=job.id,
        spec=trainer_pb2.JobSpec(
            kind=f"JOB_KIND_{job.spec.kind.name}",
            resources=trainer_pb2.JobResources(
                num_processes=resources.num_processes,
                gpus_per_process=resources.gpus_per_process,
                cpus_per_process=resources.cpus_per_process,
                memory_bytes_per_process=resources.memory_bytes_per_process,
                queue_name=resources.queue_name,
                labels=dict(resources.labels),
                image=resources.image,
                processes_per_node=resources.processes_per_node,
            ),
        ),
        state=f"JOB_STATE_{job.state.name}",
        progress=_progress(job.progress),
        run_directory=job.run_directory,
        error=job.error,
        create_time=_timestamp(job.create_time),
        num_attempts=job.num_attempts,
    )
    message.spec.config.update(job.spec.config)
    if job.start_time is not None:
        message.start_time.CopyFrom(_timestamp(job.start_time))
    if job.end_time is not None:
        message.end_time.CopyFrom(_timestamp(job.end_time))
    return message


def event_to_proto(event: JobEvent) -> trainer_pb2.WatchJobResponse:
    """The message of an event."""
    message = trainer_pb2.WatchJobResponse(sequence=event.sequence, event_time=_timestamp(event.time))
    match event.payload:
        case StateChange(state=state, error=error):
            change = trainer_pb2.JobStateChange(state=f"JOB_STATE_{state.name}", error=error)
            message.state_change.CopyFrom(change)
        case JobProgress() as progress:
            message.progress.CopyFrom(_progress(progress))
        case metrics:
            message.metrics.CopyFrom(trainer_pb2.StepMetrics(step=metrics.step, values=metrics.values))
    return message


def _progress(progress: JobProgress) -> trainer_pb2.JobProgress:
    return trainer_pb2.JobProgress(step=progress.step, total_steps=progress.total_steps, message=progress.message)


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp


def _whole_numbers(value: Any) -> Any:
    """Struct knows only doubles: 3 arrives as 3.0, which a strict integer setting would refuse."""
    if isinstance(value, dict):
        return {key: _whole_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
