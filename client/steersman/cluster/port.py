"""The seam between those who make workloads and the API server."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol


@dataclass(frozen=True)
class Kind:
    """A kind of objects that runs pods, by its place in the API."""

    group: str
    version: str
    plural: str

    @property
    def resource(self) -> str:
        """As RBAC names it, `jobs.batch`."""
        return f"{self.plural}.{self.group}"


JOBS: Final = Kind("batch", "v1", "jobs")
JOBSETS: Final = Kind("jobset.x-k8s.io", "v1alpha2", "jobsets")
# Kueue's own object beside each Job that waits in one of its queues.
ADMISSIONS: Final = Kind("kueue.x-k8s.io", "v1beta1", "workloads")


@dataclass(frozen=True)
class LogLine:
    """A line that a pod has printed, and when, as the kubelet writes it: texts that sort by time."""

    moment: str
    text: str


def kind_of(thing: Mapping[str, Any]) -> Kind:
    """The kind of an object that runs pods."""
    return {"Job": JOBS, "JobSet": JOBSETS}[thing["kind"]]


class ClusterApi(Protocol):
    """One namespace of a cluster. Methods block, and raise ApiProblem. Thread-safe."""

    namespace: str

    def find(self, kind: Kind, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        """The objects with these labels."""
        ...

    def get(self, kind: Kind, name: str) -> dict[str, Any]:
        """One object."""
        ...

    def apply(self, thing: Mapping[str, Any]) -> dict[str, Any]:
        """Server-side apply of a Job, JobSet or Service, without taking fields from other managers. Returns it."""
        ...

    def change(self, kind: Kind, name: str, uid: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Merges changes into an object; its uid must match. Returns it."""
        ...

    def delete(self, kind: Kind, name: str, uid: str, *, wait_for_pods: bool) -> None:
        """Deletes an object and its pods. With `wait_for_pods` it goes after them. Its uid must match."""
        ...

    def pods(self, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        """The pods with these labels, oldest first."""
        ...

    def delete_pod(self, name: str, uid: str, *, grace_seconds: int) -> None:
        """Deletes a pod; its uid must match."""
        ...

    def events(self, uid: str) -> list[dict[str, Any]]:
        """Events about the object with this uid."""
        ...

    def logs(
        self, pod: str, *, follow: bool = False, tail_lines: int | None = None, since: str = ""
    ) -> Iterator[LogLine]:
        """The lines that a pod has printed after the moment `since`. With `follow` until the pod ends, or the API
        server ends the stream.
        """
        ...

    def close(self) -> None:
        """Ends the connections."""
        ...
