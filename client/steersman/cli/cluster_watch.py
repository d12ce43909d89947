"""Following jobs of a cluster: their events, from what the API server says and the log tells, and the log itself.

Looks every few seconds, and reads the log of the first pod while that runs. A stream that breaks is taken up where
it ended: every line of a log has the time of its printing, and those that were seen are left out.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from steersman.cli.cluster_jobs import ClusterJobs, Workload
from steersman.client.types import JobEvent, JobProgress, JobState, StateChange, StepMetrics
from steersman.cluster import lines
from steersman.cluster.explain import explain_problem, is_transient, newest_pod
from steersman.cluster.problem import ApiProblem

POLL_SECONDS: Final = 2.0
MAX_WAIT_SECONDS: Final = 60.0
# An API server that is away for longer is not waited for.
MAX_AWAY_SECONDS: Final = 300.0
# States in which nothing moves until somebody moves it.
_STILL: Final = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

Note = Callable[[str], None]


def pause(seconds: float) -> None:
    """Waits."""
    time.sleep(seconds)


@dataclass
class _Tail:
    """The log of one pod, each line once."""

    pod: str
    last: str = ""

    def read(self, jobs: ClusterJobs, *, follow: bool, tail_lines: int | None = None) -> Iterator[str]:
        """Lines that were not read yet. Raises ApiProblem."""
        for line in jobs.logs(self.pod, follow=follow, tail_lines=tail_lines, since=self.last):
            self.last = line.moment
            yield line.text


class Watcher:
    """Follows one job."""

    def __init__(
        self,
        jobs: ClusterJobs,
        job_id: str,
        *,
        note: Note,
    ) -> None:
        self._jobs = jobs
        self._job_id = job_id
        self._note = note
        self._num_events = 0
        self._num_problems = 0
        self._answered = time.monotonic()

    def events(self) -> Iterator[JobEvent]:
        """What happens, until nothing happens any more by itself. Raises ApiProblem for what does not pass."""
        state: JobState | None = None
        message, step, total = "", 0, 0
        tail: _Tail | None = None
        while True:
            if (now := self._look()) is None:
                continue
            if now.state is not state and now.state not in _STILL:
                state = now.state
                yield self._event(StateChange(state=state))
            if (waiting := now.standing.waiting) and waiting != message:
                message = waiting
                yield self._event(JobProgress(step=step, total_steps=total, message=message))
            name = _readable(now, 0)
            if name is None:
                tail = None
            elif tail is None or tail.pod != name:
                tail = _Tail(name)
            if tail is not None:
                for told in filter(None, map(lines.read, self._lines(tail, follow=now.state not in _STILL))):
                    if told.metrics:
                        step = told.step
                        yield self._event(StepMetrics(step=step, values=told.metrics))
                    else:
                        step, total, message = told.step, told.total_steps, told.message
                        yield self._event(JobProgress(step=step, total_steps=total, message=message))
            if now.state in _STILL:
                break
            pause(POLL_SECONDS)
        error = now.standing.ending if now.state is JobState.FAILED else ""
        yield self._event(StateChange(state=now.state, error=error))

    def log(self, *, node: int = 0, follow: bool = False, tail_lines: int | None = None) -> Iterator[str]:
        """What the newest pod of a node has printed; with `follow`, of its successors too, until the job ends."""
        tail: _Tail | None = None
        while True:
            now = self._look()
            name = None if now is None else _readable(now, node)
            if name is not None and (tail is None or tail.pod != name):
                if tail is not None:
                    self._note(f"pod {name} goes on")
                    tail_lines = None
                tail = _Tail(name)
            if now is not None and tail is None and (now.state in _STILL or not follow):
                why = now.standing.waiting or now.standing.ending or "its pods are gone"
                self._note(f"no pod of job {self._job_id} has a log: {why}")
                return
            if tail is not None:
                yield from self._lines(tail, follow=follow, tail_lines=tail_lines, patient=follow)
            if not follow or (now is not None and now.state in _STILL):
                return
            pause(POLL_SECONDS)

    def _look(self) -> Workload | None:
        """The job now; None, after a while, if the API server cannot say for a moment."""
        try:
            now = self._jobs.get(self._job_id)
        except ApiProblem as problem:
            self._bear(problem)
            return None
        self._num_problems = 0
        self._answered = time.monotonic()
        return now

    def _lines(
        self, tail: _Tail, *, follow: bool, tail_lines: int | None = None, patient: bool = True
    ) -> Iterator[str]:
        try:
            yield from tail.read(self._jobs, follow=follow, tail_lines=tail_lines)
        except ApiProblem as problem:
            # 400: the container has not started; 404: its pod is gone. A look tells.
            if problem.status in (400, 404):
                return
            if not patient:
                raise
            # 0: it broke off, or was silent.
            if problem.status != 0:
                self._bear(problem)

    def _bear(self, problem: ApiProblem) -> None:
        """Waits after a failure that may pass; raises every other."""
        if not is_transient(problem) or time.monotonic() - self._answered > MAX_AWAY_SECONDS:
            raise problem
        if self._num_problems == 0:
            self._note(f"{explain_problem(problem, namespace=self._jobs.namespace)}; trying again")
        self._num_problems += 1
        asked = min(problem.retry_after_seconds or 0.0, MAX_WAIT_SECONDS)
        pause(max(asked, min(POLL_SECONDS * self._num_problems, MAX_WAIT_SECONDS)))

    def _event(self, what: StateChange | JobProgress | StepMetrics) -> JobEvent:
        self._num_events += 1
        return JobEvent(sequence=self._num_events, time=datetime.now(UTC), event=what)


def _readable(now: Workload, node: int) -> str | None:
    """The newest pod of a node that has printed something, or may have."""
    pod = newest_pod(now.pods, node)
    if pod is None or pod.get("status", {}).get("phase") == "Pending":
        return None
    return str(pod["metadata"]["name"])
