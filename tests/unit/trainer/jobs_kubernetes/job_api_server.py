"""An API server for the namespace `rl` over real HTTP, as the Kubernetes documentation has it: Jobs, JobSets, Services,
Kueue's Workloads, pods with their logs, and events; server-side apply with its conflicts and immutable fields, merge
patches, deletion in the foreground and background with what objects own, preconditions. The controllers are played by
the test. Refusals on request.
"""

import copy
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from api_server import Refusal, status_object

REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
}
CORE = "/api/v1/namespaces/rl/"
GROUPS = {
    "jobs": "/apis/batch/v1/namespaces/rl/",
    "jobsets": "/apis/jobset.x-k8s.io/v1alpha2/namespaces/rl/",
    "workloads": "/apis/kueue.x-k8s.io/v1beta1/namespaces/rl/",
    "services": CORE,
    "pods": CORE,
    "events": CORE,
}
# Of what a list of objects, and RBAC, call them.
RBAC_GROUPS = {"jobs": "batch", "jobsets": "jobset.x-k8s.io", "workloads": "kueue.x-k8s.io"}
OPTIONAL = {"jobsets", "workloads"}
NOW = "2026-01-01T00:00:00Z"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is none."""


def _merge(held: dict[str, Any], changes: dict[str, Any]) -> None:
    """A JSON merge patch (RFC 7386)."""
    for key, value in changes.items():
        if value is None:
            held.pop(key, None)
        elif isinstance(value, dict):
            _merge(held.setdefault(key, {}), value)
        else:
            held[key] = value


class JobApiServer:
    """Use as a context manager. `requests` tells what was asked: "list jobs", "patch jobs NAME"."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._uids = itertools.count(1)
        self.objects: dict[str, dict[str, dict[str, Any]]] = {resource: {} for resource in GROUPS}
        # Custom resources whose definitions are there.
        self.installed = set(OPTIONAL)
        # Lines that pods have printed, each with its time, and streams of them that are cut.
        self.logs: dict[str, list[tuple[str, str]]] = {}
        self.rights: set[tuple[str, str, str]] = set()
        self.requests: list[str] = []
        self.refusals: dict[str, list[Refusal]] = {}
        self.deletions: list[dict[str, Any]] = []
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> "JobApiServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def kubeconfig(self) -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "rl"}}],
            "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{self._server.server_port}"}}],
            "users": [{"name": "test", "user": {"token": "secret-of-the-test"}}],
        }

    def refuse(self, what: str, *refusals: Refusal) -> None:
        """Answers the next requests of a verb and resource ("patch jobs") so."""
        with self._lock:
            self.refusals.setdefault(what, []).extend(refusals)

    def count(self, what: str) -> int:
        with self._lock:
            return sum(one.startswith(what) for one in self.requests)

    def jobs(self) -> list[str]:
        with self._lock:
            return sorted(self.objects["jobs"])

    def job(self, name: str) -> dict[str, Any]:
        with self._lock:
            return copy.deepcopy(self.objects["jobs"][name])

    def log(self, pod: str, *lines: str) -> None:
        """The container of a pod prints."""
        with self._lock:
            printed = self.logs.setdefault(pod, [])
            for line in lines:
                printed.append((f"2026-01-01T00:00:{len(printed):02d}.000000000Z", line))

    # What controllers do.

    def add_pod(self, job: str, status: dict[str, Any], *, index: int | None = None) -> str:
        """The Job controller makes a pod; the JobSet's, through a Job that is not seen here. Returns its name."""
        with self._lock:
            uid = f"uid-{next(self._uids)}"
            kind = "jobs" if job in self.objects["jobs"] else "jobsets"
            held = self.objects[kind][job]
            owner, spec = held["metadata"]["uid"], held["spec"]
            own = "batch.kubernetes.io/controller-uid" if kind == "jobs" else "jobset.sigs.k8s.io/jobset-uid"
            if kind == "jobsets":
                spec = spec["replicatedJobs"][0]["template"]["spec"]
            labels = dict(spec["template"]["metadata"]["labels"])
            labels |= {own: owner, "batch.kubernetes.io/job-name": job}
            if index is not None:
                labels["batch.kubernetes.io/job-completion-index"] = str(index)
            name = f"{job}-{uid}"
            metadata = {"name": name, "namespace": "rl", "uid": uid, "labels": labels, "creationTimestamp": uid}
            # The scheduler has placed it, unless that is what it waits for.
            waits = any(one["type"] == "PodScheduled" for one in status.get("conditions") or ())
            spec = {} if waits else {"nodeName": "node-1"}
            self.objects["pods"][name] = {"metadata": metadata, "spec": spec, "status": status}
            return name

    def set_pod(self, name: str, status: dict[str, Any]) -> None:
        with self._lock:
            self.objects["pods"][name]["status"] = status

    def end_pod(self, name: str) -> None:
        """The kubelet has ended a pod that is being deleted; its Job goes after it, if that waits for it."""
        with self._lock:
            owner = self.objects["pods"].pop(name)["metadata"]["labels"]["batch.kubernetes.io/job-name"]
            if self.objects["jobs"].get(owner, {"metadata": {}})["metadata"].get("deletionTimestamp"):
                self._remove("jobs", owner)

    def set_condition(self, job: str, kind: str, **details: str) -> None:
        with self._lock:
            condition = {"type": kind, "status": "True"} | details
            plural = "jobs" if job in self.objects["jobs"] else "jobsets"
            self.objects[plural][job].setdefault("status", {}).setdefault("conditions", []).append(condition)

    def add_event(self, uid: str, reason: str, message: str) -> None:
        with self._lock:
            name = f"event-{next(self._uids)}"
            self.objects["events"][name] = {
                "metadata": {"name": name},
                "involvedObject": {"uid": uid},
                "reason": reason,
                "message": message,
                "lastTimestamp": NOW,
            }

    # What the API server does.

    def _remove(self, resource: str, name: str) -> None:
        """An object goes, and what it owns by the garbage collector."""
        uid = self.objects[resource].pop(name)["metadata"]["uid"]
        for things in self.objects.values():
            for owned, one in list(things.items()):
                if any(owner["uid"] == uid for owner in one["metadata"].get("ownerReferences") or ()):
                    del things[owned]

    def _change(self, resource: str, name: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        held = self.objects[resource].get(name)
        if held is None:
            return 404, status_object(404, "NotFound", f'{resource} "{name}" not found')
        if asked["metadata"].get("uid") != held["metadata"]["uid"]:
            message = f'Operation cannot be fulfilled on {resource} "{name}": Precondition failed: UID in precondition'
            return 409, status_object(409, "Conflict", message)
        _merge(held, asked)
        return 200, held

    def _apply(self, resource: str, name: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        held = self.objects[resource].get(name)
        if held is None:
            metadata = asked["metadata"] | {"uid": f"uid-{next(self._uids)}", "creationTimestamp": NOW}
            held = self.objects[resource][name] = asked | {"metadata": metadata, "status": {}}
            return 201, held
        if held["metadata"].get("managedFields"):
            fields = "\n- .spec.backoffLimit\n- .spec.completions"
            message = f'Apply failed with 2 conflicts: conflicts with "kubectl-create" using batch/v1:{fields}'
            return 409, status_object(409, "Conflict", message)
        if resource == "jobs" and held["spec"]["template"] != asked["spec"]["template"]:
            message = f'Job.batch "{name}" is invalid: spec.template: Invalid value: {{}}: field is immutable'
            return 422, status_object(422, "Invalid", message)
        return 200, held

    def _delete(self, resource: str, name: str, options: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.deletions.append({"resource": resource, "name": name} | options)
        held = self.objects[resource].get(name)
        if held is None:
            return 404, status_object(404, "NotFound", f'{resource} "{name}" not found')
        wanted = (options.get("preconditions") or {}).get("uid")
        if wanted not in (None, held["metadata"]["uid"]):
            message = f"the UID in the precondition ({wanted}) does not match the UID in record"
            return 409, status_object(409, "Conflict", message)
        held["metadata"]["deletionTimestamp"] = NOW
        if resource in ("jobs", "jobsets"):
            owned = [
                pod
                for pod in self.objects["pods"].values()
                if held["metadata"]["uid"] in pod["metadata"]["labels"].values()
            ]
            for pod in owned:
                pod["metadata"]["deletionTimestamp"] = NOW
            if not owned or options["propagationPolicy"] == "Background":
                self._remove(resource, name)
        return 200, held

    def _list(self, resource: str, query: dict[str, str]) -> dict[str, Any]:
        wanted = dict(part.split("=", 1) for part in query.get("labelSelector", "").split(",") if part)
        uid = query.get("fieldSelector", "").removeprefix("involvedObject.uid=")
        items = [
            one
            for one in self.objects[resource].values()
            if wanted.items() <= (one["metadata"].get("labels") or {}).items()
            and (not uid or one["involvedObject"]["uid"] == uid)
        ]
        # Null for an empty list, as Go writes a nil slice.
        return {"kind": "List", "metadata": {"resourceVersion": "1"}, "items": items or None}

    def _handler(server) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self._answer("get")

            def do_PATCH(self) -> None:
                self._answer("patch")

            def do_DELETE(self) -> None:
                self._answer("delete")

            def _answer(self, verb: str) -> None:
                url = urlsplit(self.path)
                query = {key: values[0] for key, values in parse_qs(url.query).items()}
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
                resource, name = server._place(url.path)
                if name.endswith("/log"):
                    self._log(name.removesuffix("/log"), query)
                    return
                verb = "list" if verb == "get" and not name else verb
                merge = self.headers["Content-Type"] == "application/merge-patch+json"
                group = RBAC_GROUPS.get(resource, "")
                server.rights.add((group, resource, verb))
                with server._lock:
                    server.requests.append(f"{verb} {resource} {name}".strip())
                    waiting = server.refusals.get(f"{verb} {resource}")
                    if waiting:
                        self._refuse(waiting.pop(0))
                        return
                    if resource in OPTIONAL - server.installed:
                        code, document = 404, status_object(404, "NotFound", "the server could not find the resource")
                    elif verb == "patch" and merge:
                        code, document = server._change(resource, name, body)
                    elif verb == "patch":
                        assert self.headers["Content-Type"] == "application/apply-patch+yaml"
                        assert query["fieldManager"] == "steersman"
                        assert query["force"].lower() == "false"
                        assert body["metadata"]["name"] == name
                        if name not in server.objects[resource]:
                            server.rights.add((group, resource, "create"))
                        code, document = server._apply(resource, name, body)
                    elif verb == "delete":
                        code, document = server._delete(resource, name, body)
                    elif verb == "list":
                        code, document = 200, server._list(resource, query)
                    elif (held := server.objects[resource].get(name)) is not None:
                        code, document = 200, held
                    else:
                        code, document = 404, status_object(404, "NotFound", f'{resource} "{name}" not found')
                    data = json.dumps(document).encode()
                self._whole(code, {}, data)

            def _log(self, pod: str, query: dict[str, str]) -> None:
                server.rights.add(("", "pods/log", "get"))
                with server._lock:
                    server.requests.append(f"log {pod}")
                    waiting = server.refusals.get("get pods/log")
                    printed = server.logs.get(pod)
                if waiting:
                    self._refuse(waiting.pop(0))
                    return
                if printed is None:
                    message = f'container "worker" in pod "{pod}" is waiting to start: ContainerCreating'
                    self._refuse(Refusal(400, message))
                    return
                assert query["timestamps"].lower() == "true"
                assert int(query.get("sinceSeconds", 1)) > 0
                count = int(query.get("tailLines", len(printed)))
                text = "".join(f"{moment} {line}\n" for moment, line in printed[max(0, len(printed) - count) :])
                self._whole(200, {"Content-Type": "text/plain"}, text.encode())

            def _refuse(self, refusal: Refusal) -> None:
                reason = REASONS.get(refusal.code, "Unknown")
                document = json.dumps(status_object(refusal.code, reason, refusal.message)).encode()
                self._whole(refusal.code, refusal.headers, refusal.page or document)

            def _whole(self, code: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(code)
                for key, value in ({"Content-Type": "application/json"} | headers).items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        return Handler

    @staticmethod
    def _place(path: str) -> tuple[str, str]:
        for resource, group in GROUPS.items():
            if path == f"{group}{resource}":
                return resource, ""
            if path.startswith(f"{group}{resource}/"):
                return resource, path.removeprefix(f"{group}{resource}/")
        raise AssertionError(path)
