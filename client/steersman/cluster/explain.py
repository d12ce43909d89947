"""What workloads, pods and refusals of the API server mean, and what to do about them: pure functions over its JSON."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from steersman.cluster.objects import CONTAINER, EXIT_STOPPED, LABEL_INDEX, LABEL_QUEUE
from steersman.cluster.problem import ApiProblem, Asked

Object = Mapping[str, Any]

FIELD_MANAGER: Final = "steersman"

# Requests that may succeed when they are made again, a proxy's answers among them.
_TRANSIENT: Final = frozenset({0, 408, 429, 500, 502, 503, 504})
_MAX_TEXT: Final = 500
# Conditions of Jobs and of JobSets that end them.
_WELL: Final = frozenset({"Complete", "Completed"})
_OVER: Final = _WELL | {"Failed"}
# How the API server's RBAC says no: verb, resource, group.
_MISSING_RIGHT: Final = re.compile(r'cannot (\w+) resource "([^"]*)" in API group "([^"]*)"')
# In what a controller says of a pod that it could not make.
_POD_NAME: Final = re.compile(r'pods "[^"]*"')

_POLICY: Final = "an admission policy of the cluster refuses it, and says why"
_BAD_FIELD: Final = "a setting under kubernetes does not suit this cluster: the message names its field"

# Why a controller could not make a pod, by what the API server says. The first that is found.
_CREATION_ADVICE: Final = {
    "exceeded quota": "wait until other pods have ended, ask for less, or have the ResourceQuota raised",
    "serviceaccount": "create the ServiceAccount, or set kubernetes.service_account",
    "PriorityClass": "create the PriorityClass, or set kubernetes.priority_class",
    "is invalid": _BAD_FIELD,
}
# Of a container that waits, by the reason that the kubelet gives.
_CONTAINER_ADVICE: Final = {
    "ErrImagePull": "check kubernetes.image, that nodes reach its registry, and kubernetes.image_pull_secrets",
    "ImagePullBackOff": "check kubernetes.image, that nodes reach its registry, and kubernetes.image_pull_secrets",
    "ErrImageNeverPull": "put the image on the node, or set kubernetes.image_pull_policy to IfNotPresent",
    "InvalidImageName": "kubernetes.image, or the job's resources.image, is no name of an image",
    "CreateContainerConfigError": "create the Secret that it names (kubernetes.env_from_secrets), or drop it; for a "
    "user that is root, set kubernetes.run_as_user",
    "CreateContainerError": "see the events of the pod",
    "RunContainerError": "see the events of the pod; the image may have no python",
}
_EVENT_ADVICE: Final = {
    "FailedMount": "create the volume's PersistentVolumeClaim, Secret or ConfigMap (kubernetes.run_claim, "
    "kubernetes.volumes)",
    "FailedAttachVolume": "the volume may be in use on another node: a claim that is ReadWriteOnce serves pods of one "
    "node only",
}


def is_transient(problem: ApiProblem) -> bool:
    """Whether the same request may succeed later."""
    return problem.status in _TRANSIENT


def explain_problem(problem: ApiProblem, *, namespace: str) -> str:
    """Which object, why, and what to do, for a request that failed."""
    asked = problem.asked or Asked("use", "the API")
    subject = (
        f"{asked.resource} {namespace}/{asked.name}" if asked.name else f"{asked.resource} in namespace {namespace}"
    )
    # Of several conflicts the API server makes lines.
    why = _short(" ".join(str(problem).split()))
    return f"cannot {asked.verb} {subject}: {why}; {_advice(problem, namespace)}"


def _advice(problem: ApiProblem, namespace: str) -> str:
    text = str(problem).lower()
    match problem.status:
        case 0:
            return "is the API server up, and can it be reached from here (network, proxy, NetworkPolicy)?"
        case 401:
            return "the token or certificate is not valid any more: check the ServiceAccount, or log in again"
        case 403 if "exceeded quota" in text:
            return "wait until other objects have ended, ask for less, or have the ResourceQuota raised"
        case 403 if "being terminated" in text:
            return f"the namespace {namespace} is being deleted: use another (kubernetes.namespace)"
        case 403 if (missing := _MISSING_RIGHT.search(str(problem))) is not None:
            # What is missing may not be what was asked: an apply takes `create` too.
            rule = "apiGroups: [{2!r}], resources: [{1!r}], verbs: [{0!r}]".format(*missing.groups())
            return f"give this service's ServiceAccount a Role in {namespace} with {rule}"
        case 403:
            return _POLICY
        # So do ValidatingAdmissionPolicies.
        case 422 if "denied request" in text:
            return _POLICY
        case 404 if problem.asked is not None and problem.asked.resource.startswith("jobsets."):
            return "install the JobSet controller, or set kubernetes.jobset to false"
        case 404:
            return f"create the namespace {namespace}, or set kubernetes.namespace"
        case 409 if "conflict" in text:
            return (
                f"another manager has set these fields of the same object; it was not made by {FIELD_MANAGER}, or was "
                "changed by hand: delete it, and resume the job"
            )
        case 409:
            return "an object of this name is in the way: delete it, and resume the job"
        case 400 | 422:
            return _BAD_FIELD
        case 429:
            when = f"in {problem.retry_after_seconds:.0f} s" if problem.retry_after_seconds else "later"
            return f"the API server is busy: ask again {when}"
        case 500 if problem.asked is not None and problem.asked.resource == "pods/log":
            return "the API server has logs from the pod's node: is that up (kubectl get nodes)?"
        case _:
            return "see the logs of the API server"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a workload is.

    Attributes:
        alive: until it is over: then no pod of it runs any more.
        succeeded: whether it ended well.
        ending: how it ended.
        waiting: why it does not run, while it lives.
    """

    alive: bool
    succeeded: bool = False
    ending: str = ""
    waiting: str = ""


def is_over(workload: Object) -> bool:
    """Whether no pod of a Job or JobSet runs any more, or it is being deleted."""
    return bool(workload["metadata"].get("deletionTimestamp")) or not _OVER.isdisjoint(_conditions(workload))


def standing(workload: Object, pods: Sequence[Object], events_of: Callable[[str], Iterable[Object]]) -> Standing:
    """How a Job or JobSet is. `events_of` lists the events of an object by its uid; asked only if they are needed."""
    conditions = _conditions(workload)
    if conditions.keys() & _WELL:
        return Standing(alive=False, succeeded=True, ending="ended well")
    if (failed := conditions.get("Failed")) is not None:
        return Standing(alive=False, ending=_ending(failed, pods))
    if workload["metadata"].get("deletionTimestamp"):
        return Standing(alive=True)
    current = [pod for pod in pods if pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")]
    if current:
        newest = {_index(pod): pod for pod in current}
        waits = (_pod_waits(newest[index], events_of) for index in sorted(newest))
        return Standing(alive=True, waiting=next(filter(None, waits), ""))
    if pods and pods[-1].get("status", {}).get("phase") == "Succeeded":
        return Standing(alive=True)  # its controller is about to say so
    return Standing(alive=True, waiting=_workload_waits(workload, conditions, events_of))


def newest_pod(pods: Sequence[Object], node: int) -> Object | None:
    """The newest pod of a node of a workload, None if there is none; `pods` are the oldest first."""
    return next((pod for pod in reversed(pods) if _index(pod) == node), None)


def _index(pod: Object) -> int:
    return int((pod["metadata"].get("labels") or {}).get(LABEL_INDEX, "0"))


def _ending(failed: Object, pods: Sequence[Object]) -> str:
    """Why a workload failed, from the last pod that still can be seen and did not end because another had."""
    gone = ""
    for pod in reversed(pods):
        name, status = pod["metadata"]["name"], pod.get("status", {})
        for container in status.get("containerStatuses") or ():
            ended = (container.get("state") or {}).get("terminated")
            if container.get("name") != CONTAINER or not ended or ended.get("exitCode") in (0, EXIT_STOPPED):
                continue
            tail = _short(ended.get("message") or "", keep_end=True)
            return f"{_exit(ended)} in pod {name}" + (f"; it printed last:\n{tail}" if tail else "")
        if (reason := status.get("reason")) and not gone:
            gone = f"was ended with pod {name}: {reason}: {_short(status.get('message') or '')}"
    return gone or f"ended, and its pod is gone: {failed.get('reason', '')}: {_short(failed.get('message') or '')}"


def _exit(ended: Object) -> str:
    if ended.get("reason") == "OOMKilled":
        return "was killed: it needed more than its memory limit (raise resources.memory_bytes_per_process)"
    code = ended.get("exitCode", 0)
    return f"was killed by signal {code - 128}" if code > 128 else f"exited with status {code}"


def _pod_waits(pod: Object, events_of: Callable[[str], Iterable[Object]]) -> str:
    """Why a pod does not run yet; empty once it does."""
    metadata, status = pod["metadata"], pod.get("status", {})
    if metadata.get("deletionTimestamp"):
        return f"pod {metadata['name']} is being ended by the cluster; the next one goes on from the last checkpoint"
    if status.get("phase") == "Running":
        return ""
    what = f"pod {metadata['name']} waits"
    placed = _conditions(pod, value="False").get("PodScheduled")
    if placed is not None:
        why = placed.get("message") or ""
        advice = "free or add such a node, ask for less, or see kubernetes.node_selector and kubernetes.tolerations"
        if placed.get("reason") == "SchedulingGated":
            advice = "what gated it must let it go"
        elif "persistentvolumeclaim" in why.lower():
            advice = "see to that claim (kubernetes.run_claim, kubernetes.volumes) and its storage class"
        return f"{what}: {placed.get('reason')}: {_short(why)}; {advice}"
    if not pod.get("spec", {}).get("nodeName"):
        return f"{what}: no node has been chosen for it yet; if that lasts, is the cluster's scheduler up?"
    for container in status.get("containerStatuses") or ():
        waiting = (container.get("state") or {}).get("waiting") or {}
        if (reason := waiting.get("reason", "")) in _CONTAINER_ADVICE:
            return f"{what}: {reason}: {_short(waiting.get('message') or '')}; {_CONTAINER_ADVICE[reason]}"
    for event in _newest_first(events_of(metadata["uid"])):
        if (reason := event.get("reason", "")) in _EVENT_ADVICE:
            return f"{what}: {reason}: {_short(event.get('message') or '')}; {_EVENT_ADVICE[reason]}"
    return f"{what}: its node prepares it"


def _workload_waits(job: Object, conditions: Mapping[str, Object], events_of: Callable[[str], Iterable[Object]]) -> str:
    """Why a Job or JobSet has no pod."""
    metadata, kind = job["metadata"], job.get("kind", "Job")
    what = f"{kind} {metadata['name']} has no pod yet"
    if job.get("spec", {}).get("suspend"):
        queue = (metadata.get("labels") or {}).get(LABEL_QUEUE, "")
        why = _short((conditions.get("Suspended") or {}).get("message") or "")
        if queue:
            return f"{kind} {metadata['name']} waits for Kueue to admit it from queue {queue} ({why or 'suspended'})"
        return f"{kind} {metadata['name']} is suspended ({why}); set its spec.suspend to false to go on"
    for event in _newest_first(events_of(metadata["uid"])):
        if event.get("reason") == "FailedCreate":
            # Each try has a name of its own, which is no news.
            message = _POD_NAME.sub("its pod", event.get("message") or "")
            advice = next((advice for part, advice in _CREATION_ADVICE.items() if part in message), _POLICY)
            return f"{what}: {_short(message)}; {advice}"
    return what


def _conditions(thing: Object, value: str = "True") -> Mapping[str, Object]:
    conditions = thing.get("status", {}).get("conditions") or ()
    return {condition["type"]: condition for condition in conditions if condition.get("status") == value}


def _newest_first(events: Iterable[Object]) -> list[Object]:
    return sorted(events, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "", reverse=True)


def _short(text: str, *, keep_end: bool = False) -> str:
    text = text.strip()
    if len(text) <= _MAX_TEXT:
        return text
    return f"...{text[-_MAX_TEXT:]}" if keep_end else f"{text[:_MAX_TEXT]}..."
