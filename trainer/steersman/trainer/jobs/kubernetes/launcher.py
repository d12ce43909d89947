"""Workers as Kubernetes Jobs.

A handle is `namespace/name/uid` of a Job; the uid tells it from a later Job of the same name. Every launch makes a Job
of its own, numbered, unless one of the training job still runs: a service that ended between a launch and its record
finds the Job again by its labels.

Invariant: only what the API server says about a Job changes what is told about its worker. While it cannot be asked,
the last answer stands.
"""

import asyncio
import fnmatch
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import yaml

from steersman.cluster import objects
from steersman.cluster.explain import explain_problem, is_over, is_transient, newest_pod, standing
from steersman.cluster.making import make, make_rest
from steersman.cluster.objects import LABEL_ATTEMPT, LABEL_JOBSET_OWNER, LABEL_POD_OWNER, Workload
from steersman.cluster.port import JOBS, JOBSETS, ClusterApi, Kind
from steersman.cluster.problem import ApiProblem
from steersman.cluster.settings import RESERVED_LABELS, KubernetesSettings, is_label_value, is_own_label
from steersman.trainer.jobs import folder
from steersman.trainer.jobs.launcher import LaunchRefused, LogLines, LogPart, WorkerStatus
from steersman.trainer.jobs.model import JobResources, JobSpec
from steersman.trainer.retry import Backoff
from steersman.wire.errors import FieldViolation, unavailable

logger = logging.getLogger(__name__)

# Not 0: that takes the pod out of the API while its container may still run, and a next one would find the run in use.
KILL_GRACE_SECONDS: Final = 1
MAX_WAIT_SECONDS: Final = 60.0
# Of one answer; a line has a few hundred bytes.
MAX_LOG_LINES: Final = 2000
MAX_NODES: Final = 1000
MAX_PROCESSES_PER_NODE: Final = 64


class KubernetesLauncher:
    """See `Launcher`. `user` and `group` are what workers run as where the settings do not say."""

    def __init__(self, settings: KubernetesSettings, api: ClusterApi, *, user: int, group: int) -> None:
        self._settings = settings
        self._api = api
        self._user = settings.run_as_user or user
        self._group = settings.run_as_group or group
        self._seen: dict[str, tuple[float, WorkerStatus]] = {}
        self._stopping: set[str] = set()
        self._complaints: dict[str, str] = {}
        self._pause = _Pause()

    def check(self, resources: JobResources) -> Sequence[FieldViolation]:
        """Processes are spread evenly over nodes; image and labels are what the settings allow."""
        image_fine = resources.image in ("", self._settings.image) or any(
            fnmatch.fnmatchcase(resources.image, pattern) for pattern in self._settings.allowed_images
        )
        bounds = {
            "num_processes": (
                resources.num_processes,
                f"0 to {MAX_NODES * MAX_PROCESSES_PER_NODE}",
                0 <= resources.num_processes <= MAX_NODES * MAX_PROCESSES_PER_NODE,
            ),
            "processes_per_node": (
                resources.processes_per_node,
                f"0 to {MAX_PROCESSES_PER_NODE}, a divisor of num_processes, with at most {MAX_NODES} nodes",
                _spread_evenly(resources),
            ),
            "gpus_per_process": (resources.gpus_per_process, "0 or 1", resources.gpus_per_process in (0, 1)),
            "cpus_per_process": (resources.cpus_per_process, "0 to 1024", 0 <= resources.cpus_per_process <= 1024),
            "memory_bytes_per_process": (
                resources.memory_bytes_per_process,
                "0 to 2**50",
                0 <= resources.memory_bytes_per_process <= 2**50,
            ),
            "queue_name": (resources.queue_name, "the name of a LocalQueue", is_label_value(resources.queue_name)),
            "image": (resources.image, "empty, or what kubernetes.allowed_images of the service allows", image_fine),
        }
        for key, value in resources.labels.items():
            allowed = f"a label of Kubernetes, not under {', '.join(RESERVED_LABELS)}"
            bounds[f"labels[{key}]"] = (value, allowed, is_own_label(key) and is_label_value(value))
        return [
            FieldViolation(field=f"spec.resources.{name}", description=f"is {value!r}, allowed: {allowed}")
            for name, (value, allowed, fine) in bounds.items()
            if not fine
        ]

    async def describe(self, run_directory: Path, spec: JobSpec) -> str:
        """See `Launcher`: the Job of a first launch, as YAML."""
        things = self._objects(run_directory.name, run_directory, spec, attempt=1)
        return yaml.safe_dump_all(things, sort_keys=False)

    async def launch(self, run_directory: Path, resources: JobResources) -> str:
        """See `Launcher`. ENGINE_UNAVAILABLE while the API server cannot be asked."""
        return await asyncio.to_thread(self._launch, run_directory)

    async def status(self, handle: str) -> WorkerStatus:
        """See `Launcher`. Asks the API server every `poll_seconds` at most."""
        due, last = self._seen.get(handle, (0.0, None))
        if last is not None and time.monotonic() < due:
            return last
        status = await asyncio.to_thread(self._status, handle, last)
        if status.alive:
            self._seen[handle] = (time.monotonic() + self._settings.poll_seconds, status)
        else:
            self._seen.pop(handle, None)
            self._stopping.discard(handle)
            self._complaints.pop(handle, None)
        return status

    async def stop(self, handle: str) -> None:
        """See `Launcher`: deletes the Job after its pod, which gets SIGTERM and its grace."""
        if handle not in self._stopping and await asyncio.to_thread(self._delete, handle, wait_for_pods=True):
            self._stopping.add(handle)
            self._seen.pop(handle, None)

    async def kill(self, handle: str) -> None:
        """See `Launcher`: deletes the Job, and its pods almost without grace."""
        if await asyncio.to_thread(self._delete, handle, wait_for_pods=False):
            self._seen.pop(handle, None)

    async def read_log(self, handle: str, run_directory: Path, part: LogPart) -> LogLines:
        """See `Launcher`: of the newest pod of a node; the cursor is that pod and the time of the last line."""
        return await asyncio.to_thread(self._read_log, handle, part)

    def _read_log(self, handle: str, part: LogPart) -> LogLines:
        named = _parse(handle)
        if named is None:
            return LogLines(lines=(), cursor=part.cursor or "-")
        self._pause.check()
        pod, _, last = part.cursor.partition(" ")
        try:
            newest = newest_pod(self._api.pods(named.pod_labels), part.node)
            if newest is None:
                return LogLines(lines=(), cursor=part.cursor or "-")
            name = newest["metadata"]["name"]
            last = last if name == pod else ""
            tail = part.tail_lines if part.tail_lines and not part.cursor else None
            printed = self._api.logs(name, tail_lines=tail, since=last)
            taken = list(islice(printed, MAX_LOG_LINES))
        except ApiProblem as problem:
            if problem.status in (400, 404):  # it has not started, or is gone
                return LogLines(lines=(), cursor=part.cursor or "-")
            raise unavailable(self._explain(problem)) from problem
        cursor = f"{name} {taken[-1].moment if taken else last}"
        return LogLines(lines=[one.text for one in taken], cursor=cursor, more=len(taken) == MAX_LOG_LINES)

    def _objects(self, job_id: str, run_directory: Path, spec: JobSpec, *, attempt: int) -> list[dict[str, Any]]:
        workload = Workload(
            job_id=job_id,
            kind=str(spec.kind),
            run_directory=str(run_directory),
            resources=spec.resources,
            attempt=attempt,
            user=self._user,
            group=self._group,
        )
        return objects.workload_objects(workload, self._settings, namespace=self._api.namespace)

    def _launch(self, run_directory: Path) -> str:
        self._pause.check()
        job_file = folder.read_job_file(run_directory)
        describe = partial(self._objects, job_file.job_id, run_directory, job_file.spec)
        try:
            earlier = self._earlier(job_file.job_id, job_file.spec.resources)
            for workload in earlier:
                if not is_over(workload):
                    # The service ended before it had recorded it, and maybe before all was made.
                    make_rest(self._api, workload, describe(attempt=_attempt(workload))[1:])
                    return _handle(workload)
            made = make(self._api, describe(attempt=1 + max(map(_attempt, earlier), default=0)))
        except ApiProblem as problem:
            raise self._refusal(problem) from problem
        self._pause.end()
        return _handle(made)

    def _earlier(self, job_id: str, resources: JobResources) -> list[dict[str, Any]]:
        """The workloads of a training job, of the kinds that it may have."""
        labels = objects.own_labels(self._settings.instance, job_id)
        kinds = [JOBSETS] if self._settings.jobset and resources.num_nodes > 1 else [JOBS]
        return [one for kind in kinds for one in self._api.find(kind, labels)]

    def _refusal(self, problem: ApiProblem) -> Exception:
        why = self._explain(problem)
        if not is_transient(problem):
            return LaunchRefused(why)
        self._pause.begin(problem, why)
        return unavailable(why)

    def _status(self, handle: str, last: WorkerStatus | None) -> WorkerStatus:
        named = _parse(handle)
        if named is None:
            return WorkerStatus(alive=False, ending="was started by another kind of launcher")
        if why := self._pause.why():
            return _unknown(last, why)
        try:
            workload = self._api.get(named.kind, named.name)
            if workload["metadata"]["uid"] != named.uid:
                return _gone(named)
            now = standing(workload, self._api.pods(named.pod_labels), self._api.events)
        except ApiProblem as problem:
            if problem.status == 404 and problem.asked is not None and problem.asked.resource == named.kind.resource:
                return _gone(named)
            return _unknown(last, self._complain(handle, problem))
        self._pause.end()
        self._complaints.pop(handle, None)
        return WorkerStatus(alive=now.alive, ending=now.ending, waiting=now.waiting)

    def _delete(self, handle: str, *, wait_for_pods: bool) -> bool:
        """Whether the API server has taken it, or knew of no such workload any more."""
        named = _parse(handle)
        if named is None:
            return True
        if self._pause.why():
            return False
        try:
            _unless_gone(partial(self._api.delete, named.kind, named.name, named.uid, wait_for_pods=wait_for_pods))
            if not wait_for_pods:
                delete = partial(self._api.delete_pod, grace_seconds=KILL_GRACE_SECONDS)
                for pod in self._api.pods(named.pod_labels):
                    _unless_gone(partial(delete, pod["metadata"]["name"], pod["metadata"]["uid"]))
        except ApiProblem as problem:
            self._complain(handle, problem)
            return False
        return True

    def _explain(self, problem: ApiProblem) -> str:
        return explain_problem(problem, namespace=self._api.namespace)

    def _complain(self, handle: str, problem: ApiProblem) -> str:
        """Logs what is wrong once, and leaves a server in peace that is busy or away. Returns what is wrong."""
        why = self._explain(problem)
        if is_transient(problem):
            self._pause.begin(problem, why)
        if self._complaints.get(handle) != why:
            logger.warning("%s", why, extra={"worker": handle})
            self._complaints[handle] = why
        return why


class _Pause:
    """Between a request that the API server could not answer and the next of any kind. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._backoff = Backoff(initial_seconds=1.0, max_seconds=30.0)
        self._num_failures = 0
        self._until = 0.0
        self._why = ""

    def begin(self, problem: ApiProblem, why: str) -> None:
        with self._lock:
            asked_for = min(problem.retry_after_seconds or 0.0, MAX_WAIT_SECONDS)
            self._until = time.monotonic() + max(asked_for, self._backoff.delay(self._num_failures))
            self._num_failures += 1
            self._why = why

    def end(self) -> None:
        with self._lock:
            self._num_failures = 0

    def why(self) -> str:
        """Why nothing may be asked now; empty if it may."""
        with self._lock:
            return self._why if time.monotonic() < self._until else ""

    def check(self) -> None:
        """Raises ENGINE_UNAVAILABLE if nothing may be asked now."""
        if why := self.why():
            raise unavailable(why)


@dataclass(frozen=True, kw_only=True)
class _Named:
    """What a handle says."""

    namespace: str
    kind: Kind
    name: str
    uid: str

    @property
    def pod_labels(self) -> Mapping[str, str]:
        return {LABEL_JOBSET_OWNER if self.kind == JOBSETS else LABEL_POD_OWNER: self.uid}


def _handle(workload: Mapping[str, Any]) -> str:
    metadata, jobset = workload["metadata"], workload["kind"] == "JobSet"
    return objects.handle_of(metadata["namespace"], metadata["name"], metadata["uid"], jobset=jobset)


def _parse(handle: str) -> _Named | None:
    """What a handle says; None for one of another launcher."""
    match handle.split("/"):
        case [namespace, name, uid]:
            return _Named(namespace=namespace, kind=JOBS, name=name, uid=uid)
        case [namespace, JOBSETS.plural, name, uid]:
            return _Named(namespace=namespace, kind=JOBSETS, name=name, uid=uid)
    return None


def _attempt(workload: Mapping[str, Any]) -> int:
    return int((workload["metadata"].get("labels") or {}).get(LABEL_ATTEMPT, "0"))


def _spread_evenly(resources: JobResources) -> bool:
    count, on_one = max(1, resources.num_processes), resources.processes_per_node
    if not 0 <= on_one <= MAX_PROCESSES_PER_NODE:
        return False
    # Without it all processes are on one node.
    return count <= MAX_PROCESSES_PER_NODE if on_one == 0 else count % on_one == 0 and count // on_one <= MAX_NODES


def _gone(named: _Named) -> WorkerStatus:
    what = "JobSet" if named.kind == JOBSETS else "Job"
    return WorkerStatus(alive=False, ending=f"is gone: its {what} {named.namespace}/{named.name} was deleted")


def _unknown(last: WorkerStatus | None, why: str) -> WorkerStatus:
    """A worker that cannot be asked after. One that was seen to run tells its progress itself."""
    return WorkerStatus(alive=True, waiting=why if last is None or last.waiting else "")


def _unless_gone(delete: Callable[[], None]) -> None:
    """Deletes. 404: it is gone; 409: another of its name has come, whose uid differs."""
    try:
        delete()
    except ApiProblem as problem:
        if problem.status not in (404, 409):
            raise
