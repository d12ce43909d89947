"""Training jobs that the command itself keeps in a cluster, by the user's kubeconfig and without a trainer service.

The workload is the record: its annotations say what it runs and how it was made, its conditions how it stands.
Cancelled is suspended, which ends the pods with SIGTERM and keeps the rest; resumed is not suspended any more, or the
next attempt, made of what the last one says. A Job that Kueue admits is switched by its Workload, because suspending is
Kueue's own way to do it.
"""

import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

from steersman.client.types import Job, JobKind, JobProgress, JobResources, JobState
from steersman.cluster import objects, resources
from steersman.cluster.explain import Standing, standing
from steersman.cluster.making import make
from steersman.cluster.objects import COMMAND, LABEL_ATTEMPT, LABEL_JOB, LABEL_QUEUE
from steersman.cluster.port import ADMISSIONS, JOBS, JOBSETS, ClusterApi, LogLine, kind_of
from steersman.cluster.problem import ApiProblem
from steersman.cluster.settings import KubernetesSettings
from steersman.wire.errors import Reason, SteersmanError, invalid_field, not_found

ANNOTATION_SETTINGS: Final = "steersman/settings"
ANNOTATION_CANCELLED: Final = "steersman/cancelled"
_KUEUE_JOB: Final = "kueue.x-k8s.io/job-uid"
# The user that the trainer's image is made for.
_IMAGE_USER: Final = 10001
_RUNS: Final = "/data/runs"
_JOB_ID: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# Annotations of an object have 256 KiB in all.
MAX_SPEC_BYTES: Final = 128 * 1024


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A workload as it is in the cluster, with its pods, oldest first."""

    thing: Mapping[str, Any]
    pods: tuple[Mapping[str, Any], ...]
    standing: Standing

    @property
    def job_id(self) -> str:
        """The id of the job that it is an attempt of."""
        return str(self.thing["metadata"]["labels"][LABEL_JOB])

    @property
    def name(self) -> str:
        """The name of the object."""
        return str(self.thing["metadata"]["name"])

    @property
    def state(self) -> JobState:
        """Where the job stands, by this attempt."""
        if not self.standing.alive:
            return JobState.SUCCEEDED if self.standing.succeeded else JobState.FAILED
        running = [pod for pod in self.pods if pod.get("status", {}).get("phase") in ("Pending", "Running", "Unknown")]
        if self.thing["metadata"].get("deletionTimestamp"):
            return JobState.CANCELLING
        if ANNOTATION_CANCELLED in self.annotations:
            return JobState.CANCELLING if running else JobState.CANCELLED
        return JobState.PENDING if self.standing.waiting else JobState.RUNNING

    @property
    def annotations(self) -> Mapping[str, str]:
        """Of the object."""
        return self.thing["metadata"].get("annotations") or {}

    def job(self) -> Job:
        """As the command shows jobs."""
        spec = json.loads(self.annotations[objects.ANNOTATION_SPEC])
        state = self.state
        status = self.thing.get("status", {})
        waiting = "" if state is JobState.CANCELLED else self.standing.waiting
        return Job(
            id=self.job_id,
            kind=JobKind(spec["kind"]),
            config=spec["config"],
            resources=JobResources(**spec["resources"]),
            state=state,
            progress=JobProgress(step=0, total_steps=0, message=waiting),
            run_directory=self.annotations.get(objects.ANNOTATION_RUN, ""),
            error=self.standing.ending if state is JobState.FAILED else "",
            create_time=_time(self.thing["metadata"].get("creationTimestamp")),
            start_time=_time(status.get("startTime")),
            end_time=_time(status.get("completionTime")),
            num_attempts=_attempt(self.thing),
        )


class ClusterJobs:
    """The jobs of one instance in one namespace. Methods block; they raise ApiProblem, and SteersmanError."""

    def __init__(self, api: ClusterApi, *, instance: str) -> None:
        self._api = api
        self._instance = instance

    @property
    def namespace(self) -> str:
        """Where the jobs are."""
        return self._api.namespace

    def create(self, things: list[dict[str, Any]]) -> Workload:
        """Makes the objects of a new job. ALREADY_EXISTS if the cluster knows a job of this id."""
        job_id = str(things[0]["metadata"]["labels"][LABEL_JOB])
        if found := self._find(job_id):
            now = self._look(found[-1]).state
            advice = "it runs" if not now.is_terminal else f"`steersman jobs resume {job_id} --on kubernetes` goes on"
            raise SteersmanError(Reason.ALREADY_EXISTS, f"job {job_id!r} is {now} in {self.namespace}; {advice}")
        return self._look(make(self._api, things, patient=False))

    def newest(self) -> list[Workload]:
        """The newest attempt of each job, newest job first."""
        newest: dict[str, dict[str, Any]] = {}
        for thing in self._find(None):
            newest[thing["metadata"]["labels"][LABEL_JOB]] = thing
        found = sorted(newest.values(), key=lambda one: one["metadata"].get("creationTimestamp") or "", reverse=True)
        return [self._look(thing) for thing in found]

    def get(self, job_id: str) -> Workload:
        """The newest attempt of a job. NOT_FOUND if there is none."""
        if not (found := self._find(job_id)):
            known = sorted({thing["metadata"]["labels"][LABEL_JOB] for thing in self._find(None)})
            raise not_found("job", job_id, known)
        return self._look(found[-1])

    def cancel(self, job_id: str) -> Workload:
        """Has a job write a checkpoint and stop; asking again changes nothing. JOB_STATE if it has ended."""
        now = self.get(job_id)
        if now.state in (JobState.SUCCEEDED, JobState.FAILED):
            raise SteersmanError(Reason.JOB_STATE, f"job {job_id!r} is {now.state}, allowed: pending, running")
        if ANNOTATION_CANCELLED not in now.annotations:
            self._switch(now, on=False)
        return self.get(job_id)

    def resume(self, job_id: str) -> Workload:
        """Goes on with a failed or cancelled job. JOB_STATE if it is neither."""
        now = self.get(job_id)
        match now.state:
            case JobState.CANCELLED:
                self._switch(now, on=True)
                return self.get(job_id)
            case JobState.FAILED:
                return self._look(make(self._api, self._next_attempt(now), patient=False))
        raise SteersmanError(Reason.JOB_STATE, f"job {job_id!r} is {now.state}, allowed: failed, cancelled")

    def delete(self, job_id: str) -> int:
        """Deletes all objects of a job after its pods, which write their checkpoint. Returns how many attempts."""
        if not (found := self._find(job_id)):
            self.get(job_id)
        for thing in found:
            metadata = thing["metadata"]
            self._api.delete(kind_of(thing), metadata["name"], metadata["uid"], wait_for_pods=True)
        return len(found)

    def logs(self, pod: str, *, follow: bool, tail_lines: int | None, since: str) -> Iterator[LogLine]:
        """See `ClusterApi.logs`."""
        return self._api.logs(pod, follow=follow, tail_lines=tail_lines, since=since)

    def _find(self, job_id: str | None) -> list[dict[str, Any]]:
        """Workloads of one job, or of all, the first attempt of each first."""
        labels = {"app.kubernetes.io/managed-by": COMMAND, "app.kubernetes.io/instance": self._instance}
        if job_id is not None:
            labels[LABEL_JOB] = job_id
        found = self._api.find(JOBS, labels)
        try:
            found += self._api.find(JOBSETS, labels)
        except ApiProblem as problem:
            # Where the JobSet controller is not installed, or may not be asked after, there are none.
            if problem.status not in (403, 404):
                raise
        # The Jobs of a JobSet have its labels.
        own = [one for one in found if not one["metadata"].get("ownerReferences")]
        return sorted(own, key=_attempt)

    def _look(self, thing: Mapping[str, Any]) -> Workload:
        labels = thing["metadata"]["labels"]
        of_attempt = objects.own_labels(self._instance, labels[LABEL_JOB], manager=COMMAND)
        pods = self._api.pods(of_attempt | {LABEL_ATTEMPT: labels[LABEL_ATTEMPT]})
        return Workload(thing=thing, pods=tuple(pods), standing=standing(thing, pods, self._api.events))

    def _switch(self, now: Workload, *, on: bool) -> None:
        kind, metadata = kind_of(now.thing), now.thing["metadata"]
        mark = None if on else datetime.now(UTC).isoformat(timespec="seconds")
        changes: dict[str, Any] = {"metadata": {"annotations": {ANNOTATION_CANCELLED: mark}}}
        if LABEL_QUEUE not in metadata["labels"]:
            changes["spec"] = {"suspend": not on}
            self._api.change(kind, now.name, metadata["uid"], changes)
            return
        admissions = self._api.find(ADMISSIONS, {_KUEUE_JOB: metadata["uid"]})
        for one in admissions:
            self._api.change(ADMISSIONS, one["metadata"]["name"], one["metadata"]["uid"], {"spec": {"active": on}})
        if not admissions:
            message = f"Kueue has no Workload for {now.name}: is it installed? `steersman jobs delete` ends the job"
            raise SteersmanError(Reason.JOB_STATE, message)
        self._api.change(kind, now.name, metadata["uid"], changes)

    def _next_attempt(self, last: Workload) -> list[dict[str, Any]]:
        settings = KubernetesSettings(**json.loads(last.annotations[ANNOTATION_SETTINGS]))
        spec = json.loads(last.annotations[objects.ANNOTATION_SPEC])
        wanted = resources.JobResources(**spec["resources"])
        return job_objects(
            last.job_id,
            JobKind(spec["kind"]),
            spec["config"],
            wanted,
            settings,
            namespace=self.namespace,
            attempt=1 + _attempt(last.thing),
        )


def job_objects(
    job_id: str,
    kind: JobKind,
    config: Mapping[str, Any],
    wanted: resources.JobResources,
    settings: KubernetesSettings,
    *,
    namespace: str,
    attempt: int = 1,
) -> list[dict[str, Any]]:
    """The objects of a job that the command makes. INVALID_FIELD for an id or settings that cannot be."""
    if not _JOB_ID.fullmatch(job_id):
        allowed = "1 to 63 lower-case letters, digits and hyphens, neither first nor last a hyphen"
        raise invalid_field("job_id", job_id, allowed)
    spec = {"job_id": job_id, "kind": str(kind), "config": dict(config), "resources": asdict(wanted)}
    text = json.dumps(spec, ensure_ascii=False)
    if len(text.encode()) > MAX_SPEC_BYTES:
        allowed = f"at most {MAX_SPEC_BYTES}: settings travel in an annotation"
        raise invalid_field("config", f"{len(text.encode())} bytes as JSON", allowed)
    workload = objects.Workload(
        job_id=job_id,
        kind=str(kind),
        run_directory=f"{settings.run_mount_path or _RUNS}/{job_id}",
        resources=wanted,
        attempt=attempt,
        user=settings.run_as_user or _IMAGE_USER,
        group=settings.run_as_group or _IMAGE_USER,
        manager=COMMAND,
        spec=text,
    )
    things = objects.workload_objects(workload, settings, namespace=namespace)
    annotations = things[0]["metadata"]["annotations"]
    kept = settings.model_dump(mode="json", exclude_defaults=True)
    things[0]["metadata"]["annotations"] = annotations | {ANNOTATION_SETTINGS: json.dumps(kept)}
    return things


def new_job_id(kind: JobKind) -> str:
    """An id that tells the kind and the time, and is new."""
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return f"{kind.replace('_', '-')}-{moment}-{secrets.token_hex(2)}"


def _attempt(thing: Mapping[str, Any]) -> int:
    return int(thing["metadata"]["labels"].get(LABEL_ATTEMPT, "0"))


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
