"""What the pods of training jobs look like in this cluster."""

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from steersman.wire.limits import MIB

# RFC 1123, and what Kubernetes takes for the values of labels.
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_OBJECT_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")

_ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")

# Always a volume of its own: the root file system is read-only.
TMP_PATH = "/tmp"
SHARED_MEMORY_PATH = "/dev/shm"
# What the launcher tells a worker of itself.
RESERVED_ENV = ("STEERSMAN_POD_", "STEERSMAN_WORKER_")

# Labels under these are the launcher's, or the cluster's.
RESERVED_LABELS = (
    "app.kubernetes.io/",
    "batch.kubernetes.io/",
    "jobset.sigs.k8s.io/",
    "kueue.x-k8s.io/",
    "steersman/",
    "job-name",
)


def is_label_value(text: str) -> bool:
    """True for what may stand as the value of a label."""
    return _LABEL_VALUE.fullmatch(text) is not None


def is_own_label(key: str) -> bool:
    """True for a label that people may set on a job."""
    return _LABEL_KEY.fullmatch(key) is not None and not key.startswith(RESERVED_LABELS)


def _object_name(text: str) -> str:
    if not _OBJECT_NAME.fullmatch(text):
        raise ValueError("allowed: the name of an object: small letters, digits, hyphens and dots")
    return text


def _absolute(path: str) -> str:
    if not PurePosixPath(path).is_absolute() or ":" in path:
        raise ValueError("allowed: an absolute path without colons")
    return path


def _labels(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        if not is_own_label(key) or not is_label_value(value):
            raise ValueError(f"{key}={value} is no label, or one under {', '.join(RESERVED_LABELS)}")
    return labels


def _environment(values: dict[str, str]) -> dict[str, str]:
    for name in values:
        if not _ENV_NAME.fullmatch(name) or name.startswith(RESERVED_ENV):
            raise ValueError(
                f"{name!r} is no name, allowed: letters, digits, _ . -, not under {', '.join(RESERVED_ENV)}"
            )
    return values


ObjectName = Annotated[str, AfterValidator(_object_name)]
AbsolutePath = Annotated[str, AfterValidator(_absolute)]


class PodToleration(BaseModel):
    """A taint that pods of jobs tolerate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str = Field("", description="Key of the taint; empty with operator Exists is every taint.")
    operator: Literal["Exists", "Equal"] = Field("Exists", description="Whether the value counts.")
    value: str = Field("", description="Value of the taint, for operator Equal.")
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = Field(
        "", description="Effect of the taint; empty is each."
    )


class PodVolume(BaseModel):
    """One more volume of the pods, from exactly one source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mount_path: AbsolutePath = Field(description="Where it is seen.")
    claim: ObjectName | None = Field(default=None, description="PersistentVolumeClaim, for models and data sets.")
    secret: ObjectName | None = Field(
        default=None, description="Secret, for certificates and tokens; always read-only."
    )
    config_map: ObjectName | None = Field(default=None, description="ConfigMap, for an authority's certificate.")
    memory_bytes: int | None = Field(
        default=None, gt=0, description="Memory of so many bytes, for example at /dev/shm."
    )
    sub_path: str = Field(default="", description="Folder of the volume that is mounted; empty is all of it.")
    read_only: bool = Field(default=False, description="Mount it read-only.")

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        sources = {
            "claim": self.claim,
            "secret": self.secret,
            "config_map": self.config_map,
            "memory_bytes": self.memory_bytes,
        }
        given = [name for name, value in sources.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"has {' and '.join(given) or 'no source'}, allowed: exactly one of {', '.join(sources)}")
        return self


class KubernetesSettings(BaseModel):
    """Where and how jobs run in a cluster."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str = Field(min_length=1, description="Image of the workers.")
    allowed_images: tuple[str, ...] = Field(
        (), description="Patterns (`*`, `?`) of other images that a job may ask for by resources.image; none: no other."
    )
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = Field(
        "IfNotPresent", description="When nodes fetch the image."
    )
    image_pull_secrets: tuple[ObjectName, ...] = Field((), description="Secrets with the registry's credentials.")
    namespace: ObjectName | None = Field(
        None, description="Namespace of the Jobs. None: the service's own, or that of the kubeconfig's context."
    )
    instance: str = Field(
        "steersman",
        pattern=r"^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$",
        description="What tells the Jobs of this service from those of another in the same namespace.",
    )
    run_claim: ObjectName = Field(
        description="PersistentVolumeClaim of the runs directory, which this service mounts too. Its file system must "
        "do locks between nodes (flock and POSIX), unless all pods run on one."
    )
    run_mount_path: AbsolutePath | None = Field(
        None, description="Where run_claim is mounted, here as in the pods. None: at the runs directory."
    )
    run_sub_path: str = Field("", description="Folder of run_claim that is mounted; empty is all of it.")
    volumes: tuple[PodVolume, ...] = Field((), description="More volumes: models, data sets, certificates, memory.")
    env: Annotated[dict[str, str], AfterValidator(_environment)] = Field(
        default_factory=dict, description="Environment of the workers; no secrets."
    )
    env_from_secrets: tuple[ObjectName, ...] = Field(
        (), description="Secrets whose keys become environment, for example HF_TOKEN."
    )
    service_account: ObjectName | None = Field(
        None,
        description="ServiceAccount of the pods, with its token mounted; `k8s:///` addresses need one. "
        "None: the default one, without a token.",
    )
    node_selector: dict[str, str] = Field(default_factory=dict, description="Labels of the nodes to run on.")
    tolerations: tuple[PodToleration, ...] = Field((), description="Taints of nodes that pods may run on all the same.")
    priority_class: ObjectName | None = Field(None, description="PriorityClass of the pods.")
    labels: Annotated[dict[str, str], AfterValidator(_labels)] = Field(
        default_factory=dict, description="More labels of Jobs and pods."
    )
    annotations: dict[str, str] = Field(default_factory=dict, description="Annotations of Jobs and pods.")
    queue_name: str = Field(
        "", description="Kueue LocalQueue of jobs that name none; Jobs with a queue begin suspended. Empty: no queue."
    )
    cpus: float = Field(1.0, gt=0, le=1024, description="CPU cores of each process of a job that asks for none.")
    memory_bytes: int = Field(
        4096 * MIB, gt=0, description="Memory of each process of a job that asks for none, in bytes."
    )
    gpu_resource: str = Field("nvidia.com/gpu", min_length=1, description="Resource that GPUs are asked for by.")
    extra_resources: dict[str, str] = Field(
        default_factory=dict, description="Further resources of each pod, for example rdma/hca: '1'."
    )
    shared_memory_bytes: int = Field(
        1024 * MIB,
        ge=0,
        description="Memory at /dev/shm in pods of several processes, counted to their limit; 0: the runtime's 64 MiB.",
    )
    network_interface: str = Field(
        "",
        pattern=r"^[-=^,.:\w]*$",
        description="Network interface that the processes of several nodes talk over (NCCL_SOCKET_IFNAME and "
        "GLOO_SOCKET_IFNAME). Empty: their choice.",
    )
    coordinator_port: int = Field(
        29400,
        ge=1024,
        le=65534,
        description="Port that the nodes of a job meet at, on its first pod; the next one is torchrun's.",
    )
    join_seconds: int = Field(
        3600,
        ge=10,
        le=604_800,
        description="Time for all nodes of a job to come, at its beginning and after one was lost; then it fails.",
    )
    jobset: bool = Field(
        False,
        description="Make jobs of several nodes as JobSets (jobset.x-k8s.io), where that controller is installed. "
        "Otherwise as Indexed Jobs, which every cluster knows.",
    )
    run_as_user: int | None = Field(
        None, ge=1, lt=2**31, description="User id of the workers. None: this service's own, so both may write runs."
    )
    run_as_group: int | None = Field(
        None, ge=1, lt=2**31, description="Group id of the workers and of their volumes. None: this service's own."
    )
    termination_grace_seconds: int = Field(
        120, ge=1, le=3600, description="Time for a worker that is evicted or preempted to write its checkpoint."
    )
    ttl_seconds_after_finished: int = Field(
        86400, ge=0, le=31_536_000, description="How long the Job and the logs of its pod are kept after its end."
    )
    poll_seconds: float = Field(2.0, gt=0, le=60, description="Time between two looks at a Job.")
    request_seconds: float = Field(20.0, gt=0, le=300, description="Deadline of a request to the API server.")

    @model_validator(mode="after")
    def _mounts_are_apart(self) -> Self:
        taken = [str(PurePosixPath(path)) for path in (TMP_PATH, self.run_mount_path) if path]
        for index, volume in enumerate(self.volumes):
            path = str(PurePosixPath(volume.mount_path))
            if path in taken:
                raise ValueError(f"volumes.{index}.mount_path is {path}, where another volume is mounted")
            taken.append(path)
        return self
