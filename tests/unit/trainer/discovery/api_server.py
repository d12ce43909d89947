"""An API server for EndpointSlices of one namespace: list and watch over real HTTP, as the Kubernetes documentation
("API concepts") has it, and its failures on request.
"""

import json
import queue
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

PATH = "/apis/discovery.k8s.io/v1/namespaces/rl/endpointslices"
LABEL = "kubernetes.io/service-name"
REASONS = {401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 429: "TooManyRequests", 503: "ServiceUnavailable"}
END, BREAK = "end", "break"


def status_object(code: int, reason: str, message: str) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }


def _service_of(one: dict[str, Any]) -> str | None:
    """Whose slice it is; None for a bookmark."""
    service: str | None = one["metadata"].get("labels", {}).get(LABEL)
    return service


@dataclass
class Refusal:
    """An answer that is no list and no watch. `page` instead of a Status object is what a proxy sends."""

    code: int
    message: str = "told to"
    headers: dict[str, str] = field(default_factory=dict)
    page: bytes | None = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is none."""


class ApiServer:
    """Use as a context manager. `requests` tells what was asked: "list", or "watch VERSION".

    With `identity`, the files of a certificate and its key, it speaks TLS.
    """

    def __init__(self, identity: tuple[Path, Path] | None = None) -> None:
        self._lock = threading.Condition()
        self._objects: dict[str, dict[str, Any]] = {}
        self._version = 100
        self._history: list[tuple[int, dict[str, Any]]] = []
        self._oldest = 0
        self._watchers: list[queue.Queue[Any]] = []
        self.requests: list[str] = []
        self.refusals: dict[str, list[Refusal]] = {"list": [], "watch": []}
        self.expected_token = "secret-of-the-test"
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._identity = identity
        if identity is not None:
            secret = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            secret.load_cert_chain(*identity)
            self._server.socket = secret.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> "ApiServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut(END)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http{'s' if self._identity else ''}://127.0.0.1:{self._server.server_port}"

    def kubeconfig(self) -> dict[str, Any]:
        """What leads a client here, with the token that is expected now."""
        authority = {"certificate-authority": str(self._identity[0])} if self._identity else {}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "rl"}}],
            "clusters": [{"name": "test", "cluster": {"server": self.url} | authority}],
            "users": [{"name": "test", "user": {"token": self.expected_token}}],
        }

    @property
    def version(self) -> int:
        return self._version

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Nobody is answered between the changes made inside."""
        with self._lock:
            yield

    def put(self, one: dict[str, Any]) -> None:
        """Adds or replaces a slice."""
        with self._lock:
            name = one["metadata"]["name"]
            self._change("MODIFIED" if name in self._objects else "ADDED", one)
            self._objects[name] = self._history[-1][1]["object"]

    def delete(self, name: str) -> None:
        with self._lock:
            self._change("DELETED", self._objects.pop(name))

    def bookmark(self) -> None:
        """Moves the version on, as changes of other objects do, and tells it."""
        with self._lock:
            self._version += 10
            self._send({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(self._version)}}})

    def forget(self) -> None:
        """Compacts: what happened so far can be listed only."""
        with self._lock:
            self._version += 1
            self._oldest = self._version

    def cut(self, how: str = BREAK) -> None:
        """Ends the watches under way: BREAK in the middle of the response, END in order."""
        with self._lock:
            self._send(how)
            self._watchers.clear()

    def send_raw(self, data: bytes) -> None:
        """Sends bytes into the watches under way."""
        with self._lock:
            self._send(data)

    def wait_for(self, count: int, kind: str) -> None:
        """Returns once `count` requests of a kind have come."""
        with self._lock:
            done = self._lock.wait_for(lambda: sum(one.startswith(kind) for one in self.requests) >= count, 20)
            assert done, f"{self.requests} has fewer than {count} of {kind}"

    def _change(self, kind: str, one: dict[str, Any]) -> None:
        self._version += 1
        held = {**one, "metadata": {**one["metadata"], "resourceVersion": str(self._version)}}
        event = {"type": kind, "object": held}
        self._history.append((self._version, event))
        self._send(event)

    def _send(self, item: Any) -> None:
        for watcher in self._watchers:
            watcher.put(item)

    def _begin(self, kind: str, version: str) -> Refusal | None:
        self.requests.append(f"{kind} {version}".strip())
        self._lock.notify_all()
        return self.refusals[kind].pop(0) if self.refusals[kind] else None

    def _handler(server) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                asked = {key: values[0] for key, values in parse_qs(url.query).items()}
                assert url.path == PATH, url.path
                label, _, service = asked["labelSelector"].partition("=")
                assert label == LABEL
                if self.headers["Authorization"] != f"Bearer {server.expected_token}":
                    self._refuse(Refusal(401, "Unauthorized"))
                elif asked.get("watch", "").lower() == "true":
                    assert asked["allowWatchBookmarks"].lower() == "true"
                    assert int(asked["timeoutSeconds"]) > 0
                    self._watch(asked["resourceVersion"], service)
                else:
                    self._list(service)

            def _list(self, service: str) -> None:
                with server._lock:
                    refusal = server._begin("list", "")
                    items = [one for one in server._objects.values() if _service_of(one) == service]
                    version = str(server._version)
                if refusal is not None:
                    self._refuse(refusal)
                    return
                document = {"kind": "EndpointSliceList", "metadata": {"resourceVersion": version}, "items": items}
                self._whole(200, {}, json.dumps(document).encode())

            def _watch(self, version: str, service: str) -> None:
                coming: queue.Queue[Any] = queue.Queue()
                with server._lock:
                    refusal = server._begin("watch", version)
                    gone = int(version) < server._oldest
                    happened = [event for at, event in server._history if at > int(version)]
                    missed = [event for event in happened if _service_of(event["object"]) == service]
                    if refusal is None and not gone:
                        server._watchers.append(coming)
                if refusal is not None:
                    self._refuse(refusal)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                if gone:
                    expired = status_object(410, "Expired", f"too old resource version: {version} ({server._oldest})")
                    self._chunk(json.dumps({"type": "ERROR", "object": expired}).encode() + b"\n")
                    self._chunk(b"")
                    return
                for event in missed:
                    self._chunk(json.dumps(event).encode() + b"\n")
                while (item := coming.get()) not in (END, BREAK):
                    if isinstance(item, dict) and _service_of(item["object"]) not in (service, None):
                        continue
                    line = item if isinstance(item, bytes) else json.dumps(item).encode() + b"\n"
                    # In two pieces: events do not come in whole reads.
                    self._chunk(line[: len(line) // 2])
                    self._chunk(line[len(line) // 2 :])
                if item == END:
                    self._chunk(b"")
                else:
                    self.close_connection = True

            def _chunk(self, data: bytes) -> None:
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()

            def _refuse(self, refusal: Refusal) -> None:
                reason = REASONS.get(refusal.code, "Unknown")
                document = json.dumps(status_object(refusal.code, reason, refusal.message)).encode()
                self._whole(refusal.code, refusal.headers, refusal.page or document)

            def _whole(self, code: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        return Handler
