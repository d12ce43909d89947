"""The objects of a workload: a pure function of what is asked for and of the cluster's settings.

One node is a batch/v1 Job of one pod. Several are an Indexed Job, whose pods find the first of them by a headless
Service, or a JobSet, whose controller makes that Service.

Invariants of every workload:

- At most one pod an index at a time (`podReplacementPolicy: Failed`), and no try again but for two reasons: the cluster
  took the pod away (`DisruptionTarget`), or it ended to be started again (`EXIT_STOPPED`). Other failures end the whole
  workload; whether it is started again is for whoever made it to say. A pod that is lost is made again alone; the
  others see it go, and begin the attempt anew with the next one (`steersman.trainer.jobs.node`).
- What it runs as is no root, holds no capability, and writes only to its volumes.
- It can be found by labels, belongs to one job of one maker, and goes away by itself after its end, with what it owns.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from steersman.cluster.resources import JobResources
from steersman.cluster.settings import SHARED_MEMORY_PATH, TMP_PATH, KubernetesSettings, PodVolume
from steersman.wire.limits import MIB

# 128 + SIGTERM: the worker wrote its checkpoint because it was told to stop, and whoever told it starts it again.
EXIT_STOPPED: Final = 143
# Environment of a worker that something else than the trainer service starts again: the handle that it is known by.
ENV_HANDLE: Final = "STEERSMAN_WORKER_HANDLE"
# Environment of a worker that no trainer service has made a run folder for: the file that says what to run.
ENV_SPEC: Final = "STEERSMAN_WORKER_SPEC"
# Environment of a worker whose failure may come of the loss of another node: how many there are.
ENV_NODES: Final = "STEERSMAN_WORKER_NODES"

LABEL_JOB: Final = "steersman/job-id"
LABEL_ATTEMPT: Final = "steersman/attempt"
LABEL_QUEUE: Final = "kueue.x-k8s.io/queue-name"
ANNOTATION_RUN: Final = "steersman/run-directory"
ANNOTATION_SPEC: Final = "steersman/job"
LABEL_POD_OWNER: Final = "batch.kubernetes.io/controller-uid"
LABEL_JOBSET_OWNER: Final = "jobset.sigs.k8s.io/jobset-uid"
LABEL_INDEX: Final = "batch.kubernetes.io/job-completion-index"
CONTAINER: Final = "worker"
# Who made a workload. The service and the command leave each other's alone.
SERVICE: Final = "steersman"
COMMAND: Final = "steersman-cli"

_LABEL_POD_JOB: Final = "batch.kubernetes.io/job-name"
_LABEL_JOBSET: Final = "jobset.sigs.k8s.io/jobset-name"
_REPLICATED_JOB: Final = "workers"
# With what the controllers append to it, the host name of a pod must have 63 characters at most: -workers-0-9999
_MAX_NAME: Final = 48
_TMP_BYTES: Final = 1024 * MIB
_SPEC_FOLDER: Final = "/etc/steersman"
_SPEC_FILE: Final = "job.json"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to run.

    Attributes:
        attempt: number of the workload among those of the training job, from 1.
        user, group: that the worker runs as; the group owns its volumes too.
        manager: who makes it, SERVICE or COMMAND.
        spec: what to run, as JSON, where no trainer service has written it into the run folder.
    """

    job_id: str
    kind: str
    run_directory: str
    resources: JobResources
    attempt: int
    user: int
    group: int
    manager: str = SERVICE
    spec: str = ""

    @property
    def name(self) -> str:
        """The name of its objects."""
        return object_name(self.job_id, self.attempt)


def workload_objects(workload: Workload, settings: KubernetesSettings, *, namespace: str) -> list[dict[str, Any]]:
    """The objects that run a job. The first owns the others (see `owned_by`), so that they go with it."""
    labels = _labels(workload, settings)
    annotations = dict(settings.annotations) | {ANNOTATION_RUN: workload.run_directory}
    if workload.spec:
        annotations[ANNOTATION_SPEC] = workload.spec
    queue = workload.resources.queue_name or settings.queue_name
    metadata = {
        "name": workload.name,
        "namespace": namespace,
        "labels": labels | ({LABEL_QUEUE: queue} if queue else {}),
        "annotations": annotations,
    }
    several = workload.resources.num_nodes > 1
    whole = {
        # Kueue starts it. Its webhook would suspend it too, but not where the webhook is down.
        **({"suspend": True} if queue else {}),
        "ttlSecondsAfterFinished": settings.ttl_seconds_after_finished,
    }
    job_spec = _job_spec(workload, settings, labels, annotations)
    if several and settings.jobset:
        spec = whole | {
            "network": {"enableDNSHostnames": True, "subdomain": workload.name, "publishNotReadyAddresses": True},
            # Lost pods are made again by their Job; what ends that ends all.
            "failurePolicy": {"maxRestarts": 0},
            "replicatedJobs": [
                {
                    "name": _REPLICATED_JOB,
                    "replicas": 1,
                    "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": job_spec},
                }
            ],
        }
        return [{"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": whole | job_spec}
    return [job, _service(workload, labels, namespace)] if several else [job]


def owned_by(thing: Mapping[str, Any], owner: Mapping[str, Any]) -> dict[str, Any]:
    """An object that the cluster deletes with its owner, an object as the API server returned it."""
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
    }
    return dict(thing) | {"metadata": dict(thing["metadata"]) | {"ownerReferences": [reference]}}


def _labels(workload: Workload, settings: KubernetesSettings) -> dict[str, str]:
    own = own_labels(settings.instance, workload.job_id, manager=workload.manager) | {
        "app.kubernetes.io/name": "steersman",
        "app.kubernetes.io/component": "training-job",
        "steersman/kind": workload.kind,
        LABEL_ATTEMPT: str(workload.attempt),
    }
    return dict(settings.labels) | dict(workload.resources.labels) | own


def _job_spec(
    workload: Workload, settings: KubernetesSettings, labels: Mapping[str, str], annotations: Mapping[str, str]
) -> dict[str, Any]:
    num_nodes = workload.resources.num_nodes
    return {
        # Not by index: a failure of one is a failure of all.
        "backoffLimit": 0,
        "completions": num_nodes,
        "parallelism": num_nodes,
        **({"completionMode": "Indexed"} if num_nodes > 1 else {}),
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
        "template": {
            "metadata": {"labels": dict(labels), "annotations": dict(annotations)},
            "spec": _pod(workload, settings),
        },
    }


def _service(workload: Workload, labels: Mapping[str, str], namespace: str) -> dict[str, Any]:
    """The names of the pods of an Indexed Job, `<job>-<index>.<job>`."""
    selector = own_labels("", workload.job_id, manager=workload.manager) | {LABEL_ATTEMPT: str(workload.attempt)}
    selector["app.kubernetes.io/instance"] = labels["app.kubernetes.io/instance"]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": workload.name, "namespace": namespace, "labels": dict(labels)},
        # They look for each other before they are ready.
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": selector},
    }


def own_labels(instance: str, job_id: str, *, manager: str = SERVICE) -> dict[str, str]:
    """The labels that the workloads of a training job are found by."""
    return {"app.kubernetes.io/managed-by": manager, "app.kubernetes.io/instance": instance, LABEL_JOB: job_id}


def object_name(job_id: str, attempt: int) -> str:
    """The name of a workload and all that it owns: 48 characters at most."""
    tail = f"-{attempt}"
    name = f"steersman-{job_id}"
    if len(name) + len(tail) > _MAX_NAME:
        digest = hashlib.blake2b(job_id.encode(), digest_size=4).hexdigest()
        name = f"{name[: _MAX_NAME - len(tail) - len(digest) - 1].rstrip('-')}-{digest}"
    return name + tail


def _pod(workload: Workload, settings: KubernetesSettings) -> dict[str, Any]:
    volumes = _volumes(workload, settings)
    mounts = [*map(_mount, volumes, volumes.values()), {"name": "tmp", "mountPath": TMP_PATH}]
    sources = [
        *({"name": name} | _source(volume) for name, volume in volumes.items()),
        {"name": "tmp", "emptyDir": {"sizeLimit": str(_TMP_BYTES)}},
    ]
    if workload.spec:
        field = {"fieldRef": {"fieldPath": f"metadata.annotations['{ANNOTATION_SPEC}']"}, "path": _SPEC_FILE}
        sources.append({"name": "job", "downwardAPI": {"items": [field]}})
        mounts.append({"name": "job", "mountPath": _SPEC_FOLDER, "readOnly": True})
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
                "command": _command(workload, settings),
                "env": _environment(workload, settings),
                "resources": _resources(workload.resources, settings),
                # What it printed last says why it failed, in the pod's status.
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": mounts,
            }
        ],
        "volumes": sources,
    }
    optional = {
        # Of a JobSet its controller sets it.
        "subdomain": workload.name if workload.resources.num_nodes > 1 and not settings.jobset else "",
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


def _volumes(workload: Workload, settings: KubernetesSettings) -> dict[str, PodVolume]:
    mount_path = settings.run_mount_path or str(PurePosixPath(workload.run_directory).parent)
    run_volume = PodVolume(mount_path=mount_path, claim=settings.run_claim, sub_path=settings.run_sub_path)
    volumes = {"runs": run_volume} | {f"volume-{number}": one for number, one in enumerate(settings.volumes)}
    shared = settings.shared_memory_bytes if workload.resources.on_one_node > 1 else 0
    if shared and all(PurePosixPath(one.mount_path) != PurePosixPath(SHARED_MEMORY_PATH) for one in settings.volumes):
        volumes["shared-memory"] = PodVolume(mount_path=SHARED_MEMORY_PATH, memory_bytes=shared)
    return volumes


def _command(workload: Workload, settings: KubernetesSettings) -> list[str]:
    python = ["python", "-P", "-m"]
    resources = workload.resources
    if max(1, resources.num_processes) == 1:
        return [*python, "steersman.trainer.jobs.worker", workload.run_directory]
    first = f"{workload.name}-{_REPLICATED_JOB}-0-0" if settings.jobset else f"{workload.name}-0"
    coordinator = f"{first}.{workload.name}" if resources.num_nodes > 1 else "127.0.0.1"
    return [
        *(*python, "steersman.trainer.jobs.node"),
        *("--nodes", str(resources.num_nodes)),
        *("--processes", str(resources.on_one_node)),
        *("--coordinator", coordinator),
        *("--port", str(settings.coordinator_port)),
        *("--join", str(settings.join_seconds)),
        # Before the cluster kills the pod.
        *("--grace", str(max(1, settings.termination_grace_seconds - 5))),
        workload.run_directory,
    ]


def _environment(workload: Workload, settings: KubernetesSettings) -> list[dict[str, Any]]:
    cpus = workload.resources.cpus_per_process or settings.cpus
    values = {
        "PYTHONUNBUFFERED": "1",
        # Threads that wait by spinning burn the quota of the pod.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(max(1, int(cpus))),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HOME": TMP_PATH,
    }
    if settings.network_interface:
        values |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), settings.network_interface)
    if workload.spec:
        values[ENV_SPEC] = f"{_SPEC_FOLDER}/{_SPEC_FILE}"
    values |= settings.env
    jobset = workload.resources.num_nodes > 1 and settings.jobset
    name_label, uid_label = (_LABEL_JOBSET, LABEL_JOBSET_OWNER) if jobset else (_LABEL_POD_JOB, LABEL_POD_OWNER)
    fields = {
        "STEERSMAN_POD_NAMESPACE": "metadata.namespace",
        "STEERSMAN_POD_JOB": f"metadata.labels['{name_label}']",
        "STEERSMAN_POD_JOB_UID": f"metadata.labels['{uid_label}']",
    }
    namespace, name, uid = (f"$({variable})" for variable in fields)
    return [
        *({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()),
        # After those that it is made of: Kubernetes expands only what stands before.
        {"name": ENV_HANDLE, "value": handle_of(namespace, name, uid, jobset=jobset)},
        *({"name": name, "value": value} for name, value in values.items()),
    ]


def handle_of(namespace: str, name: str, uid: str, *, jobset: bool) -> str:
    """What a workload is known by; its uid tells it from a later one of the same name."""
    return f"{namespace}/jobsets/{name}/{uid}" if jobset else f"{namespace}/{name}/{uid}"


def _resources(resources: JobResources, settings: KubernetesSettings) -> dict[str, Any]:
    """Of the one container of a pod: what all processes of a node need."""
    count = resources.on_one_node
    memory = str((resources.memory_bytes_per_process or settings.memory_bytes) * count)
    cpu = f"{max(1, round((resources.cpus_per_process or settings.cpus) * count * 1000))}m"
    wanted = {"cpu": cpu, "memory": memory} | dict(settings.extra_resources)
    if resources.gpus_per_process:
        wanted[settings.gpu_resource] = str(resources.gpus_per_process * count)
    return {"requests": dict(wanted), "limits": dict(wanted)}


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
