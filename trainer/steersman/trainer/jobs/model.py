"""What a job is: its kinds, its states and the moves between them, its events."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from steersman.cluster.resources import JobResources as JobResources


class JobKind(StrEnum):
    """What a job trains; the names of `steersman.v1.JobKind` without their prefix, in lower case."""

    SFT = "sft"
    REWARD_MODEL = "reward_model"
    PPO = "ppo"


class JobState(StrEnum):
    """Where a job stands; the names of `steersman.v1.JobState` without their prefix, in lower case."""

    PENDING = "pending"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ACTIVE_STATES: Final = frozenset({JobState.PENDING, JobState.RUNNING, JobState.CANCELLING})
RESUMABLE_STATES: Final = frozenset({JobState.FAILED, JobState.CANCELLED})

# From each state, the states that may follow. A dead worker is started again through PENDING.
MOVES: Final[Mapping[JobState, frozenset[JobState]]] = {
    JobState.PENDING: frozenset(
        {JobState.RUNNING, JobState.CANCELLING, JobState.CANCELLED, JobState.FAILED, JobState.PENDING}
    ),
    JobState.RUNNING: frozenset(
        {JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED, JobState.PENDING, JobState.CANCELLED}
    ),
    JobState.CANCELLING: frozenset({JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.PENDING}),
    JobState.CANCELLED: frozenset({JobState.PENDING}),
}


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """A job as it was asked for. `config` holds JSON values only."""

    kind: JobKind
    config: Mapping[str, Any]
    resources: JobResources = field(default_factory=JobResources)


@dataclass(frozen=True, kw_only=True)
class JobProgress:
    """How far a job is; `total_steps` is 0 while unknown."""

    step: int = 0
    total_steps: int = 0
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job. Times are seconds since the epoch, None while they lie ahead.

    `handle` is what the launcher knows its worker by, empty before the start. `restarts_left` counts the times that a
    worker which dies without a word will still be started again.
    """

    id: str
    spec: JobSpec
    state: JobState
    run_directory: str
    create_time: float
    progress: JobProgress = field(default_factory=JobProgress)
    error: str = ""
    start_time: float | None = None
    end_time: float | None = None
    cancel_time: float | None = None
    num_attempts: int = 0
    restarts_left: int = 0
    handle: str = ""

    @property
    def active(self) -> bool:
        """True while a worker runs or is about to."""
        return self.state in ACTIVE_STATES


@dataclass(frozen=True, kw_only=True)
class StateChange:
    """The job moved to `state`; `error` says why if it failed."""

    state: JobState
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """The numbers of a finished step under the field's names."""

    step: int
    values: Mapping[str, float]


EventPayload = StateChange | JobProgress | StepMetrics


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """One event of a job. Sequences of a job start at 1 and have no gaps."""

    sequence: int
    time: float
    payload: EventPayload
