"""The Job of a run folder: a pure function of what is asked for and of the cluster's settings.

Invariants of every Job:

- At most one pod at a time (`podReplacementPolicy: Failed`), and no try again but for two reasons: the cluster took the
  pod away (`DisruptionTarget`), or the worker wrote its checkpoint and ended because it was told to (`EXIT_STOPPED`).
  Other failures end the Job; whether it is started again is the service's to say.
- What it runs as is no root, holds no capability, and writes only to its volumes.
- It can be found by labels, belongs to one job of one service, and goes away by itself after its end.
"""

import hashlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from steersman.trainer.jobs.kubernetes.settings import TMP_PATH, KubernetesSettings, PodVolume
from steersman.trainer.jobs.launcher import ENV_HANDLE, EXIT_STOPPED
from steersman.trainer.jobs.model import JobResources
from steersman.wire.limits import MIB

LABEL_JOB: Final = "steersman/job-id"
LABEL_ATTEMPT: Final = "steersman/attempt"
LABEL_QUEUE: Final = "kueue.x-k8s.io/queue-name"
ANNOTATION_RUN: Final = "steersman/run-directory"
LABEL_POD_OWNER: Final = "batch.kubernetes.io/controller-uid"
CONTAINER: Final = "worker"

_LABEL_POD_JOB: Final = "batch.kubernetes.io/job-name"
_MAX_NAME: Final = 63
_TMP_BYTES: Final = 1024 * MIB


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to run.

    Attributes:
        attempt: number of the Job among those of the training job, from 1.
        user, group: that the worker runs as; the group owns its volumes too.
    """

    job_id: str
    kind: str
    run_directory: str
    resources: JobResources
    attempt: int
    user: int
    group: int


def job_manifest(workload: Workload, settings: KubernetesSettings, *, namespace: str) -> dict[str, Any]:
    """The batch/v1 Job that runs one worker."""
    queue = workload.resources.queue_name or settings.queue_name
    labels = own_labels(settings.instance, workload.job_id) | {
        "app.kubernetes.io/name": "steersman",
        "app.kubernetes.io/component": "training-job",
        "steersman/kind": workload.kind,
        LABEL_ATTEMPT: str(workload.attempt),
    }
    labels = dict(settings.labels) | dict(workload.resources.labels) | labels
    annotations = dict(settings.annotations) | {ANNOTATION_RUN: workload.run_directory}
    spec = {
        "backoffLimit": 0,
        "completions": 1,
        "parallelism": 1,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "Ignore",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [EXIT_STOPPED]},
                },
            ]
        },
        "ttlSecondsAfterFinished": settings.ttl_seconds_after_finished,
        "template": {
            "metadata": {"labels": labels, "annotations": annotations},
            "spec": _pod(workload, settings),
        },
    }
    if queue:
        # Kueue starts it. Its webhook would suspend it too, but not where the webhook is down.
        spec["suspend"] = True
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": job_name(workload.job_id, workload.attempt),
            "namespace": namespace,
            "labels": labels | ({LABEL_QUEUE: queue} if queue else {}),
            "annotations": annotations,
        },
        "spec": spec,
    }


def own_labels(instance: str, job_id: str) -> dict[str, str]:
    """The labels that the Jobs of a training job are found by."""
    return {"app.kubernetes.io/managed-by": "steersman", "app.kubernetes.io/instance": instance, LABEL_JOB: job_id}


def job_name(job_id: str, attempt: int) -> str:
    """The name of a Job: it is a label of its pods too, so 63 characters at most."""
    tail = f"-{attempt}"
    name = f"steersman-{job_id}"
    if len(name) + len(tail) > _MAX_NAME:
        digest = hashlib.blake2b(job_id.encode(), digest_size=4).hexdigest()
        name = f"{name[: _MAX_NAME - len(tail) - len(digest) - 1].rstrip('-')}-{digest}"
    return name + tail


def _pod(workload: Workload, settings: KubernetesSettings) -> dict[str, Any]:
    mount_path = settings.run_mount_path or str(PurePosixPath(workload.run_directory).parent)
    run_volume = PodVolume(mount_path=mount_path, claim=settings.run_claim, sub_path=settings.run_sub_path)
    volumes = {"runs": run_volume} | {f"volume-{number}": one for number, one in enumerate(settings.volumes)}
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": settings.termination_grace_seconds,
        "automountServiceAccountToken": settings.service_account is not None,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": workload.user,
            "runAsGroup": workload.group,
            "fsGroup": workload.group,
            # A runs volume has thousands of files: only if its root says otherwise.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": CONTAINER,
                "image": workload.resources.image or settings.image,
                "imagePullPolicy": settings.image_pull_policy,
                "command": ["python", "-P", "-m", "steersman.trainer.jobs.worker", workload.run_directory],
                "env": _environment(workload, settings),
                "resources": _resources(workload.resources, settings),
                # What it printed last says why it failed, in the pod's status.
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [*map(_mount, volumes, volumes.values()), {"name": "tmp", "mountPath": TMP_PATH}],
            }
        ],
        "volumes": [
            *({"name": name} | _source(volume) for name, volume in volumes.items()),
            {"name": "tmp", "emptyDir": {"sizeLimit": str(_TMP_BYTES)}},
        ],
    }
    optional = {
        "serviceAccountName": settings.service_account,
        "priorityClassName": settings.priority_class,
        "nodeSelector": dict(settings.node_selector),
        "tolerations": [
            {name: value for name, value in one.model_dump().items() if value} for one in settings.tolerations
        ],
        "imagePullSecrets": [{"name": name} for name in settings.image_pull_secrets],
    }
    if settings.env_from_secrets:
        pod["containers"][0]["envFrom"] = [{"secretRef": {"name": name}} for name in settings.env_from_secrets]
    return pod | {name: value for name, value in optional.items() if value}


def _environment(workload: Workload, settings: KubernetesSettings) -> list[dict[str, Any]]:
    cpus = workload.resources.cpus_per_process or settings.cpus
    values = {
        "PYTHONUNBUFFERED": "1",
        # Threads that wait by spinning burn the quota of the pod.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(max(1, int(cpus))),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HOME": TMP_PATH,
    } | settings.env
    fields = {
        "STEERSMAN_POD_NAMESPACE": "metadata.namespace",
        "STEERSMAN_POD_JOB": f"metadata.labels['{_LABEL_POD_JOB}']",
        "STEERSMAN_POD_JOB_UID": f"metadata.labels['{LABEL_POD_OWNER}']",
    }
    return [
        *({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()),
        # After those that it is made of: Kubernetes expands only what stands before.
        {"name": ENV_HANDLE, "value": "/".join(f"$({name})" for name in fields)},
        *({"name": name, "value": value} for name, value in values.items()),
    ]


def _resources(resources: JobResources, settings: KubernetesSettings) -> dict[str, Any]:
    memory = str(resources.memory_bytes_per_process or settings.memory_bytes)
    cpu = f"{max(1, round((resources.cpus_per_process or settings.cpus) * 1000))}m"
    gpus = {settings.gpu_resource: str(resources.gpus_per_process)} if resources.gpus_per_process else {}
    return {"requests": {"cpu": cpu, "memory": memory} | gpus, "limits": {"cpu": cpu, "memory": memory} | gpus}


def _mount(name: str, volume: PodVolume) -> dict[str, Any]:
    mount: dict[str, Any] = {"name": name, "mountPath": volume.mount_path}
    if volume.sub_path:
        mount["subPath"] = volume.sub_path
    if volume.read_only or volume.secret or volume.config_map:
        mount["readOnly"] = True
    return mount


def _source(volume: PodVolume) -> dict[str, Any]:
    if volume.claim:
        return {"persistentVolumeClaim": {"claimName": volume.claim}}
    if volume.secret:
        return {"secret": {"secretName": volume.secret, "defaultMode": 0o440}}
    if volume.config_map:
        return {"configMap": {"name": volume.config_map}}
    return {"emptyDir": {"medium": "Memory", "sizeLimit": str(volume.memory_bytes)}}
