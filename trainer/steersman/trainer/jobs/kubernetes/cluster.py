"""The API server as far as the launcher needs it: Jobs, their pods, and events about both, in one namespace.

Errors come out as `ApiProblem`, whatever broke; nothing here retries or sleeps. The package `kubernetes` is optional:
import this module only where it is needed.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import urllib3
from kubernetes import client

from steersman.trainer.discovery.cluster import load_client, problem_of
from steersman.trainer.discovery.slice_api import ApiProblem
from steersman.trainer.jobs.kubernetes.explain import FIELD_MANAGER

_CONNECT_SECONDS: Final = 5.0
# More objects of one Job than this are not looked at.
_MAX_OBJECTS: Final = 200


class Cluster:
    """`JobApi` over the official client. Thread-safe."""

    def __init__(self, api_client: client.ApiClient, *, namespace: str, request_seconds: float) -> None:
        self.namespace = namespace
        self._client = api_client
        self._batch = client.BatchV1Api(api_client)
        self._core = client.CoreV1Api(api_client)
        self._timeout = (_CONNECT_SECONDS, request_seconds)

    def jobs(self, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        """The Jobs with these labels."""
        return self._items(self._batch.list_namespaced_job, label_selector=_selector(labels))

    def job(self, name: str) -> dict[str, Any]:
        """One Job."""
        return self._ask(self._batch.read_namespaced_job, name, self.namespace)

    def apply_job(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Server-side apply, without taking fields from other managers. Returns the object."""
        return self._ask(
            self._batch.patch_namespaced_job,
            manifest["metadata"]["name"],
            self.namespace,
            dict(manifest),
            field_manager=FIELD_MANAGER,
            force=False,
            field_validation="Strict",
            _content_type="application/apply-patch+yaml",
        )

    def delete_job(self, name: str, uid: str, *, wait_for_pods: bool) -> None:
        """Deletes a Job and its pods. With `wait_for_pods` the Job goes after them. Its uid must match."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Foreground" if wait_for_pods else "Background",
            "preconditions": {"uid": uid},
        }
        self._ask(self._batch.delete_namespaced_job, name, self.namespace, body=options)

    def pods(self, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        """The pods with these labels, oldest first."""
        found = self._items(self._core.list_namespaced_pod, label_selector=_selector(labels))
        return sorted(found, key=lambda pod: pod["metadata"].get("creationTimestamp") or "")

    def delete_pod(self, name: str, uid: str, *, grace_seconds: int) -> None:
        """Deletes a pod; its uid must match."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "gracePeriodSeconds": grace_seconds,
            "preconditions": {"uid": uid},
        }
        self._ask(self._core.delete_namespaced_pod, name, self.namespace, body=options)

    def events(self, uid: str) -> list[dict[str, Any]]:
        """Events about the object with this uid."""
        return self._items(self._core.list_namespaced_event, field_selector=f"involvedObject.uid={uid}")

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()

    def _items(self, call: Callable[..., Any], **parameters: Any) -> list[dict[str, Any]]:
        return list(self._ask(call, self.namespace, limit=_MAX_OBJECTS, **parameters).get("items") or ())

    def _ask(self, call: Callable[..., Any], *arguments: Any, **parameters: Any) -> dict[str, Any]:
        try:
            # Raw: the models of the client refuse lists that are null, which the API allows.
            response = call(*arguments, _preload_content=False, _request_timeout=self._timeout, **parameters)
            try:
                document = json.loads(response.data)
            finally:
                response.release_conn()
        except client.ApiException as error:
            raise problem_of(error) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiProblem(0, f"the API server does not answer: {error}") from error
        except ValueError as error:
            raise ApiProblem(0, f"the API server answers what is no JSON: {error}") from error
        if not isinstance(document, dict):
            raise ApiProblem(0, f"the API server answers a {type(document).__name__}, not an object")
        return document


def connect(namespace: str | None, request_seconds: float) -> Cluster:
    """The cluster of the pod's service account, or else of the kubeconfig. DiscoveryRefused if there is neither."""
    api_client, default = load_client()
    return Cluster(api_client, namespace=namespace or default, request_seconds=request_seconds)


def _selector(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())
