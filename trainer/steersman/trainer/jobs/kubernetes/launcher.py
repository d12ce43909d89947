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
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import yaml

from steersman.trainer.discovery.slice_api import ApiProblem
from steersman.trainer.jobs import folder
from steersman.trainer.jobs.kubernetes.explain import explain_problem, is_transient, job_status
from steersman.trainer.jobs.kubernetes.manifest import (
    LABEL_ATTEMPT,
    LABEL_POD_OWNER,
    Workload,
    job_manifest,
    own_labels,
)
from steersman.trainer.jobs.kubernetes.settings import RESERVED_LABELS, KubernetesSettings, is_label_value, is_own_label
from steersman.trainer.jobs.launcher import LaunchRefused, WorkerStatus
from steersman.trainer.jobs.model import JobResources, JobSpec
from steersman.trainer.retry import Backoff
from steersman.wire.errors import FieldViolation, unavailable

logger = logging.getLogger(__name__)

# Not 0: that takes the pod out of the API while its container may still run, and a next one would find the run in use.
KILL_GRACE_SECONDS: Final = 1
MAX_WAIT_SECONDS: Final = 60.0
_FINISHED: Final = frozenset({"Complete", "Failed"})


class JobApi(Protocol):
    """Jobs, pods and events of one namespace; see `cluster.Cluster`. Methods block, and raise ApiProblem."""

    namespace: str

    def jobs(self, labels: Mapping[str, str]) -> list[dict[str, Any]]: ...
    def job(self, name: str) -> dict[str, Any]: ...
    def apply_job(self, manifest: Mapping[str, Any]) -> dict[str, Any]: ...
    def delete_job(self, name: str, uid: str, *, wait_for_pods: bool) -> None: ...
    def pods(self, labels: Mapping[str, str]) -> list[dict[str, Any]]: ...
    def delete_pod(self, name: str, uid: str, *, grace_seconds: int) -> None: ...
    def events(self, uid: str) -> list[dict[str, Any]]: ...


class KubernetesLauncher:
    """See `Launcher`. `user` and `group` are what workers run as where the settings do not say."""

    def __init__(self, settings: KubernetesSettings, api: JobApi, *, user: int, group: int) -> None:
        self._settings = settings
        self._api = api
        self._user = settings.run_as_user or user
        self._group = settings.run_as_group or group
        self._seen: dict[str, tuple[float, WorkerStatus]] = {}
        self._stopping: set[str] = set()
        self._complaints: dict[str, str] = {}
        self._pause = _Pause()

    def check(self, resources: JobResources) -> Sequence[FieldViolation]:
        """A job is one process for now, of an image and with labels that the settings allow."""
        image_fine = resources.image in ("", self._settings.image) or any(
            fnmatch.fnmatchcase(resources.image, pattern) for pattern in self._settings.allowed_images
        )
        bounds = {
            "num_processes": (
                resources.num_processes,
                "0 or 1: training over several processes is not there yet",
                resources.num_processes in (0, 1),
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
        manifest = self._manifest(run_directory.name, run_directory, spec, attempt=1)
        return yaml.safe_dump(manifest, sort_keys=False)

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

    def _manifest(self, job_id: str, run_directory: Path, spec: JobSpec, *, attempt: int) -> dict[str, Any]:
        workload = Workload(
            job_id=job_id,
            kind=str(spec.kind),
            run_directory=str(run_directory),
            resources=spec.resources,
            attempt=attempt,
            user=self._user,
            group=self._group,
        )
        return job_manifest(workload, self._settings, namespace=self._api.namespace)

    def _launch(self, run_directory: Path) -> str:
        self._pause.check()
        job_file = folder.read_job_file(run_directory)
        verb, name = "list", ""
        try:
            earlier = self._api.jobs(own_labels(self._settings.instance, job_file.job_id))
            for job in earlier:
                if not _is_over(job):
                    return _handle(job)
            attempts = [int(job["metadata"].get("labels", {}).get(LABEL_ATTEMPT, "0")) for job in earlier]
            manifest = self._manifest(
                job_file.job_id, run_directory, job_file.spec, attempt=1 + max(attempts, default=0)
            )
            verb, name = "patch", manifest["metadata"]["name"]
            job = self._api.apply_job(manifest)
        except ApiProblem as problem:
            raise self._refusal(problem, verb, name) from problem
        self._pause.end()
        return _handle(job)

    def _refusal(self, problem: ApiProblem, verb: str, name: str) -> Exception:
        why = self._explain(problem, verb, "jobs.batch", name)
        if not is_transient(problem):
            return LaunchRefused(why)
        self._pause.begin(problem, why)
        return unavailable(why)

    def _status(self, handle: str, last: WorkerStatus | None) -> WorkerStatus:
        named = _parse(handle)
        if named is None:
            return WorkerStatus(alive=False, ending="was started by another kind of launcher")
        name, uid = named
        if why := self._pause.why():
            return _unknown(last, why)
        verb, resource = "get", "jobs.batch"
        try:
            job = self._api.job(name)
            if job["metadata"]["uid"] != uid:
                return _gone(handle)
            verb, resource = "list", "pods"
            pods = self._api.pods({LABEL_POD_OWNER: uid})
            verb, resource = "list", "events"
            status = job_status(job, pods, self._api.events)
        except ApiProblem as problem:
            if problem.status == 404 and resource == "jobs.batch":
                return _gone(handle)
            return _unknown(last, self._complain(handle, problem, self._explain(problem, verb, resource, name)))
        self._pause.end()
        self._complaints.pop(handle, None)
        return status

    def _delete(self, handle: str, *, wait_for_pods: bool) -> bool:
        """Whether the API server has taken it, or knew of no such Job any more."""
        named = _parse(handle)
        if named is None:
            return True
        if self._pause.why():
            return False
        name, uid = named
        verb, resource = "delete", "jobs.batch"
        try:
            _unless_gone(partial(self._api.delete_job, name, uid, wait_for_pods=wait_for_pods))
            if not wait_for_pods:
                verb, resource = "list", "pods"
                for pod in self._api.pods({LABEL_POD_OWNER: uid}):
                    verb, name = "delete", pod["metadata"]["name"]
                    delete = partial(self._api.delete_pod, grace_seconds=KILL_GRACE_SECONDS)
                    _unless_gone(partial(delete, name, pod["metadata"]["uid"]))
        except ApiProblem as problem:
            self._complain(handle, problem, self._explain(problem, verb, resource, name))
            return False
        return True

    def _explain(self, problem: ApiProblem, verb: str, resource: str, name: str) -> str:
        return explain_problem(problem, verb=verb, resource=resource, namespace=self._api.namespace, name=name)

    def _complain(self, handle: str, problem: ApiProblem, why: str) -> str:
        """Logs what is wrong once, and leaves a server in peace that is busy or away. Returns `why`."""
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


def _handle(job: Mapping[str, Any]) -> str:
    metadata = job["metadata"]
    return f"{metadata['namespace']}/{metadata['name']}/{metadata['uid']}"


def _parse(handle: str) -> tuple[str, str] | None:
    """Name and uid of a handle; None for one of another launcher."""
    parts = handle.split("/")
    return (parts[1], parts[2]) if len(parts) == 3 else None


def _is_over(job: Mapping[str, Any]) -> bool:
    if job["metadata"].get("deletionTimestamp"):
        return True
    conditions = job.get("status", {}).get("conditions") or ()
    return any(one.get("type") in _FINISHED and one.get("status") == "True" for one in conditions)


def _gone(handle: str) -> WorkerStatus:
    return WorkerStatus(alive=False, ending=f"is gone: its Job {handle.rpartition('/')[0]} was deleted")


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
