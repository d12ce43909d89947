"""The API server as far as jobs need it: workloads, their pods and logs, and events about both, in one namespace.

Errors come out as `ApiProblem`, whatever broke; nothing here retries or sleeps. The package `kubernetes` is optional:
import this module only where it is needed.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import urllib3
from kubernetes import client, config

from steersman.cluster.explain import FIELD_MANAGER
from steersman.cluster.port import JOBS, JOBSETS, Kind, LogLine, kind_of
from steersman.cluster.problem import ApiProblem, Asked, NoCluster, problem_of

_CONNECT_SECONDS: Final = 5.0
# More objects of one workload than this are not looked at.
_MAX_OBJECTS: Final = 1000
# A log that says nothing for so long is opened anew: a connection that died without a sign looks the same.
_SILENCE_SECONDS: Final = 300.0
# As far as clocks may differ.
_CLOCK_SECONDS: Final = 300
_MAX_LINE_BYTES: Final = 1024 * 1024
_NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Cluster:
    """`ClusterApi` over the official client."""

    def __init__(self, api_client: client.ApiClient, *, namespace: str, request_seconds: float) -> None:
        self.namespace = namespace
        self._client = api_client
        # It serves every group, Kubernetes' own too.
        self._objects = client.CustomObjectsApi(api_client)
        self._core = client.CoreV1Api(api_client)
        self._timeout = (_CONNECT_SECONDS, request_seconds)

    def find(self, kind: Kind, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        """See `ClusterApi`."""
        place = _place(kind, self.namespace)
        found = self._items(kind.resource, self._objects.list_namespaced_custom_object, *place, labels=labels)
        # Of a list the items do not say what they are.
        what = {"apiVersion": f"{kind.group}/{kind.version}", "kind": {JOBS: "Job", JOBSETS: "JobSet"}.get(kind, "")}
        return [what | one for one in found]

    def get(self, kind: Kind, name: str) -> dict[str, Any]:
        """See `ClusterApi`."""
        asked = Asked("get", kind.resource, name)
        return self._ask(asked, self._objects.get_namespaced_custom_object, *_place(kind, self.namespace), name)

    def apply(self, thing: Mapping[str, Any]) -> dict[str, Any]:
        """See `ClusterApi`."""
        how = {
            "field_manager": FIELD_MANAGER,
            "force": False,
            "field_validation": "Strict",
            "_content_type": "application/apply-patch+yaml",
        }
        name = thing["metadata"]["name"]
        if thing["kind"] == "Service":
            asked = Asked("patch", "services", name)
            return self._ask(asked, self._core.patch_namespaced_service, name, self.namespace, dict(thing), **how)
        kind = kind_of(thing)
        asked = Asked("patch", kind.resource, name)
        patch = self._objects.patch_namespaced_custom_object
        return self._ask(asked, patch, *_place(kind, self.namespace), name, dict(thing), **how)

    def change(self, kind: Kind, name: str, uid: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """See `ClusterApi`."""
        # With its uid the server refuses to change another of this name.
        body = dict(changes) | {"metadata": dict(changes.get("metadata", {})) | {"uid": uid}}
        return self._ask(
            Asked("patch", kind.resource, name),
            self._objects.patch_namespaced_custom_object,
            *_place(kind, self.namespace),
            name,
            body,
            field_manager=FIELD_MANAGER,
            _content_type="application/merge-patch+json",
        )

    def delete(self, kind: Kind, name: str, uid: str, *, wait_for_pods: bool) -> None:
        """See `ClusterApi`."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Foreground" if wait_for_pods else "Background",
            "preconditions": {"uid": uid},
        }
        asked = Asked("delete", kind.resource, name)
        delete = self._objects.delete_namespaced_custom_object
        self._ask(asked, delete, *_place(kind, self.namespace), name, body=options)

    def pods(self, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        """See `ClusterApi`."""
        found = self._items("pods", self._core.list_namespaced_pod, self.namespace, labels=labels)
        return sorted(found, key=lambda pod: pod["metadata"].get("creationTimestamp") or "")

    def delete_pod(self, name: str, uid: str, *, grace_seconds: int) -> None:
        """See `ClusterApi`."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "gracePeriodSeconds": grace_seconds,
            "preconditions": {"uid": uid},
        }
        asked = Asked("delete", "pods", name)
        self._ask(asked, self._core.delete_namespaced_pod, name, self.namespace, body=options)

    def events(self, uid: str) -> list[dict[str, Any]]:
        """See `ClusterApi`."""
        list_events = self._core.list_namespaced_event
        return self._items("events", list_events, self.namespace, field_selector=f"involvedObject.uid={uid}")

    def logs(
        self, pod: str, *, follow: bool = False, tail_lines: int | None = None, since: str = ""
    ) -> Iterator[LogLine]:
        """See `ClusterApi`."""
        wanted: dict[str, int] = {}
        if since:
            # Whole seconds before the server's now: more lines than are new, which are known by their times.
            passed = datetime.now(UTC) - datetime.fromisoformat(since)
            wanted["since_seconds"] = max(1, math.ceil(passed.total_seconds()) + _CLOCK_SECONDS)
        elif tail_lines is not None:
            wanted["tail_lines"] = tail_lines
        asked = Asked("get", "pods/log", pod)
        response = self._open(
            asked,
            self._core.read_namespaced_pod_log,
            pod,
            self.namespace,
            follow=follow,
            timestamps=True,
            _request_timeout=(_CONNECT_SECONDS, _SILENCE_SECONDS) if follow else self._timeout,
            **wanted,
        )
        try:
            for line in _lines(response):
                moment, _, text = line.partition(" ")
                if moment > since:
                    yield LogLine(moment, text)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiProblem(0, f"the log broke off: {error}", asked=asked) from error
        finally:
            response.close()

    def close(self) -> None:
        """See `ClusterApi`."""
        self._client.close()

    def _items(
        self,
        resource: str,
        call: Callable[..., Any],
        *place: str,
        labels: Mapping[str, str] | None = None,
        **parameters: Any,
    ) -> list[dict[str, Any]]:
        if labels:
            parameters["label_selector"] = ",".join(f"{key}={value}" for key, value in labels.items())
        return list(
            self._ask(Asked("list", resource), call, *place, limit=_MAX_OBJECTS, **parameters).get("items") or ()
        )

    def _ask(self, asked: Asked, call: Callable[..., Any], *arguments: Any, **parameters: Any) -> dict[str, Any]:
        response = self._open(asked, call, *arguments, _request_timeout=self._timeout, **parameters)
        try:
            document = json.loads(response.data)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiProblem(0, f"the API server does not answer: {error}", asked=asked) from error
        except ValueError as error:
            raise ApiProblem(0, f"the API server answers what is no JSON: {error}", asked=asked) from error
        finally:
            response.release_conn()
        if not isinstance(document, dict):
            message = f"the API server answers a {type(document).__name__}, not an object"
            raise ApiProblem(0, message, asked=asked)
        return document

    def _open(self, asked: Asked, call: Callable[..., Any], *arguments: Any, **parameters: Any) -> urllib3.HTTPResponse:
        try:
            # Raw: the models of the client refuse lists that are null, which the API allows.
            response: urllib3.HTTPResponse = call(*arguments, _preload_content=False, **parameters)
        except client.ApiException as error:
            raise problem_of(error, asked) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiProblem(0, f"the API server does not answer{self._where(error)}", asked=asked) from error
        return response

    def _where(self, error: Exception) -> str:
        """Which server, and why, without the whole of the request."""
        reason = str(getattr(error, "reason", None) or error).rpartition(": ")[2]
        return f" at {self._client.configuration.host}: {reason}"


def connect(namespace: str | None, request_seconds: float, *, context: str | None = None) -> Cluster:
    """The cluster of the pod's service account, or else of the kubeconfig; with `context` of the kubeconfig. NoCluster
    if there is neither."""
    api_client, default = load_client(context)
    return Cluster(api_client, namespace=namespace or default, request_seconds=request_seconds)


def load_client(context: str | None = None) -> tuple[client.ApiClient, str]:
    """A client by the pod's service account or else the kubeconfig, and the namespace that either names. NoCluster if
    there is neither. The client never tries again by itself.
    """
    settings = client.Configuration()
    # urllib3 would sleep for as long as Retry-After says, and no stop would reach it.
    settings.retries = urllib3.Retry(0, redirect=3)
    try:
        if context is not None:
            raise config.ConfigException("a context was asked for")
        config.load_incluster_config(client_configuration=settings)
        default = _NAMESPACE_FILE.read_text(encoding="utf-8").strip() if _NAMESPACE_FILE.exists() else "default"
    except config.ConfigException as outside:
        try:
            config.load_kube_config(context=context, client_configuration=settings)
            contexts, current = config.list_kube_config_contexts()
            chosen = next((one for one in contexts if one["name"] == context), current)
            default = chosen["context"].get("namespace") or "default"
        except (config.ConfigException, OSError) as error:
            if context is not None:
                raise NoCluster(f"the kubeconfig has no context {context!r} that can be used: {error}") from error
            message = (
                f"no way to the Kubernetes API: not in a pod with a service account ({outside}), and no kubeconfig "
                f"({error}). Set KUBECONFIG, or automountServiceAccountToken: true"
            )
            raise NoCluster(message) from error
    return client.ApiClient(settings), default


def _place(kind: Kind, namespace: str) -> tuple[str, str, str, str]:
    return kind.group, kind.version, namespace, kind.plural


def _lines(response: urllib3.HTTPResponse) -> Iterator[str]:
    """Whole lines, each as soon as it is there; one without end is cut."""
    rest = b""
    for part in response.stream(65536, decode_content=True):
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
        if len(rest) > _MAX_LINE_BYTES:
            yield rest.decode(errors="replace")
            rest = b""
    if rest:
        yield rest.decode(errors="replace")
