"""What a scheduler and a kubelet do with pods, played by the test against a real API server."""

from typing import Any, Final

from control_plane import ControlPlane, Object, Refused, eventually

NODE: Final = "node-of-the-test"
# Of a status, so that what is said replaces what was said.
_NOTHING: Final = {"conditions": None, "containerStatuses": None, "reason": None, "message": None}


class Nodes:
    """One node of one namespace."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self._admin = plane.admin
        self._namespace = namespace
        if self._admin.get(f"/api/v1/nodes/{NODE}") is None:
            body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}
            self._admin.ask("POST", "/api/v1/nodes", body)

    def path(self, *parts: str) -> str:
        """Of something in /api/v1 of the namespace."""
        return "/".join((f"/api/v1/namespaces/{self._namespace}", *parts))

    def pods(self) -> dict[str, Object]:
        """All pods by name."""
        return {one["metadata"]["name"]: one for one in self._admin.ask("GET", self.path("pods"))["items"]}

    def pod(self, name: str) -> Object:
        """A pod as it is."""
        return self._admin.ask("GET", self.path("pods", name))

    def pod_of(self, job: str, *, index: int = 0, but: str = "") -> str:
        """The name of the pod that the Job controller makes for an index, once it is there; another than `but`."""

        def look() -> str | None:
            for name, pod in self.pods().items():
                labels = pod["metadata"].get("labels", {})
                of_index = int(labels.get("batch.kubernetes.io/job-completion-index", 0)) == index
                if labels.get("batch.kubernetes.io/job-name") == job and of_index and name != but:
                    return name
            return None

        return eventually(look, f"Job {job} has a pod of index {index}")

    def bind(self, name: str) -> None:
        """The scheduler gives a pod to the node."""
        target = {"apiVersion": "v1", "kind": "Node", "name": NODE}
        body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
        self._admin.ask("POST", self.path("pods", name, "binding"), body)

    def say(self, name: str, status: Object) -> None:
        """The status of a pod, instead of what it was. Of a container only what matters need be said."""
        said: dict[str, Any] = _NOTHING | status
        if containers := status.get("containerStatuses"):
            common = {"image": "trainer:1", "imageID": "", "ready": False, "restartCount": 0}
            said["containerStatuses"] = [common | one for one in containers]
        self._admin.merge(self.path("pods", name, "status"), {"status": said})

    def run(self, name: str) -> None:
        """A pod begins."""
        self.bind(name)
        state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
        self.say(name, {"phase": "Running", "containerStatuses": [{"name": "worker", "state": state}]})

    def finish(self, name: str, terminated: Object, *, conditions: tuple[Object, ...] = ()) -> None:
        """The container of a pod ends."""
        phase = "Succeeded" if terminated["exitCode"] == 0 else "Failed"
        state = [{"name": "worker", "state": {"terminated": terminated}}]
        self.say(name, {"phase": phase, "containerStatuses": state, "conditions": list(conditions) or None})

    def end(self, name: str) -> None:
        """The containers of a pod that is being deleted have ended."""
        self.finish(name, {"exitCode": 143, "reason": "Error"})
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0}
        try:
            self._admin.ask("DELETE", self.path("pods", name), body)
        except Refused as refused:
            # A controller that deletes it again meanwhile deletes it at once, since it has ended.
            if refused.status != 404:
                raise
        eventually(lambda: self._admin.get(self.path("pods", name)) is None, f"pod {name} is gone")
