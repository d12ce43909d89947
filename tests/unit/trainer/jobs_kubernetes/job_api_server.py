"""An API server for Jobs, pods and events of the namespace `rl` over real HTTP, as the Kubernetes documentation has it:
server-side apply with its conflicts and immutable fields, deletion in the foreground and background, preconditions. The
controllers are played by the test. Refusals on request.
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
GROUPS = {"jobs": "/apis/batch/v1/namespaces/rl/", "pods": "/api/v1/namespaces/rl/", "events": "/api/v1/namespaces/rl/"}
NOW = "2026-01-01T00:00:00Z"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is none."""


class JobApiServer:
    """Use as a context manager. `requests` tells what was asked: "list jobs", "patch jobs NAME"."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._uids = itertools.count(1)
        self.objects: dict[str, dict[str, dict[str, Any]]] = {"jobs": {}, "pods": {}, "events": {}}
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

    # What controllers do.

    def add_pod(self, job: str, status: dict[str, Any]) -> str:
        """The Job controller makes a pod. Returns its name."""
        with self._lock:
            uid = f"uid-{next(self._uids)}"
            owner = self.objects["jobs"][job]["metadata"]["uid"]
            labels = {"batch.kubernetes.io/controller-uid": owner, "batch.kubernetes.io/job-name": job}
            name = f"{job}-{uid}"
            metadata = {"name": name, "namespace": "rl", "uid": uid, "labels": labels, "creationTimestamp": uid}
            self.objects["pods"][name] = {"metadata": metadata, "status": status}
            return name

    def set_pod(self, name: str, status: dict[str, Any]) -> None:
        with self._lock:
            self.objects["pods"][name]["status"] = status

    def end_pod(self, name: str) -> None:
        """The kubelet has ended a pod that is being deleted; its Job goes after it, if that waits for it."""
        with self._lock:
            owner = self.objects["pods"].pop(name)["metadata"]["labels"]["batch.kubernetes.io/job-name"]
            if self.objects["jobs"].get(owner, {"metadata": {}})["metadata"].get("deletionTimestamp"):
                del self.objects["jobs"][owner]

    def set_condition(self, job: str, kind: str, **details: str) -> None:
        with self._lock:
            condition = {"type": kind, "status": "True"} | details
            self.objects["jobs"][job].setdefault("status", {}).setdefault("conditions", []).append(condition)

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

    def _apply(self, name: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        held = self.objects["jobs"].get(name)
        if held is None:
            metadata = asked["metadata"] | {"uid": f"uid-{next(self._uids)}", "creationTimestamp": NOW}
            held = self.objects["jobs"][name] = asked | {"metadata": metadata, "status": {}}
            return 201, held
        if held["metadata"].get("managedFields"):
            message = 'Apply failed with 1 conflict: conflict with "kubectl-create" using batch/v1: .spec.backoffLimit'
            return 409, status_object(409, "Conflict", message)
        if held["spec"]["template"] != asked["spec"]["template"]:
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
        if resource == "jobs":
            owned = [
                pod
                for pod in self.objects["pods"].values()
                if pod["metadata"]["labels"]["batch.kubernetes.io/controller-uid"] == held["metadata"]["uid"]
            ]
            for pod in owned:
                pod["metadata"]["deletionTimestamp"] = NOW
            if not owned or options["propagationPolicy"] == "Background":
                del self.objects["jobs"][name]
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
                verb = "list" if verb == "get" and not name else verb
                with server._lock:
                    server.requests.append(f"{verb} {resource} {name}".strip())
                    waiting = server.refusals.get(f"{verb} {resource}")
                    if waiting:
                        self._refuse(waiting.pop(0))
                        return
                    if verb == "patch":
                        assert self.headers["Content-Type"] == "application/apply-patch+yaml"
                        assert query["fieldManager"] == "steersman"
                        assert query["force"].lower() == "false"
                        assert body["metadata"]["name"] == name
                        code, document = server._apply(name, body)
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
