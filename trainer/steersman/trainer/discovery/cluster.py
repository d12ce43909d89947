"""The Kubernetes API as far as discovery needs it: list and watch the EndpointSlices of one Service.

Errors come out as `ApiProblem`, whatever broke; nothing here retries or sleeps. The package `kubernetes` is optional:
import this module only where it is needed.
"""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any, Final

import urllib3
from kubernetes import client

from steersman.cluster.api import load_client
from steersman.cluster.problem import ApiProblem, NoCluster, problem_of
from steersman.trainer.discovery.ports import DiscoveryRefused
from steersman.trainer.discovery.slice_api import Listing

_log = logging.getLogger(__name__)

# The server ends a watch after so long; the next goes on where it ended. Short, so that a connection that died without
# a sign is noticed.
WATCH_SECONDS: Final = 60
_CONNECT_SECONDS: Final = 5.0
_LIST_SECONDS: Final = 20.0
_WATCH_READ_SECONDS: Final = WATCH_SECONDS + 10.0
_SERVICE_LABEL: Final = "kubernetes.io/service-name"


class ClusterSlices:
    """`SliceApi` over the official client."""

    def __init__(self, api_client: client.ApiClient, *, namespace: str, service: str) -> None:
        self.namespace = namespace
        self._client = api_client
        # Answers are asked for raw (see `_get`), which its annotations do not know.
        self._list: Callable[..., Any] = client.DiscoveryV1Api(api_client).list_namespaced_endpoint_slice
        self._selector = f"{_SERVICE_LABEL}={service}"
        self._response: urllib3.HTTPResponse | None = None
        self._interrupted = False

    def list_slices(self) -> Listing:
        """See `SliceApi`."""
        response = self._get(timeout=_LIST_SECONDS)
        try:
            document = json.loads(response.data)
            return Listing(
                slices=tuple(document.get("items") or ()), resource_version=document["metadata"]["resourceVersion"]
            )
        except (ValueError, KeyError, TypeError, urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiProblem(0, f"the list of EndpointSlices broke off: {error!r}") from error
        finally:
            response.release_conn()

    def watch_slices(self, resource_version: str) -> Iterator[dict[str, Any]]:
        """See `SliceApi`."""
        response = self._get(
            timeout=_WATCH_READ_SECONDS,
            watch=True,
            resource_version=resource_version,
            allow_watch_bookmarks=True,
            timeout_seconds=WATCH_SECONDS,
        )
        self._response = response
        try:
            # Looked at after the response is there to be interrupted, so that no interrupt falls between.
            if not self._interrupted:
                yield from _events(response)
        except (ValueError, urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiProblem(0, f"the watch broke off: {error!r}") from error
        finally:
            self._response = None
            response.close()

    def interrupt(self) -> None:
        """See `SliceApi`."""
        self._interrupted = True
        if (response := self._response) is not None:
            try:
                response.shutdown()
            except (RuntimeError, ValueError, OSError) as error:  # it ended by itself meanwhile
                _log.debug("the watch had ended: %s", error)

    def close(self) -> None:
        """See `SliceApi`."""
        self._client.close()

    def _get(self, *, timeout: float, **parameters: Any) -> urllib3.HTTPResponse:
        try:
            # Raw: the models of the client refuse slices whose lists are null, which the API allows.
            response: urllib3.HTTPResponse = self._list(
                self.namespace,
                label_selector=self._selector,
                _preload_content=False,
                _request_timeout=(_CONNECT_SECONDS, timeout),
                **parameters,
            )
        except client.ApiException as error:
            raise problem_of(error) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiProblem(0, f"the API server does not answer: {error}") from error
        return response


def connect(service: str, namespace: str | None) -> ClusterSlices:
    """The slices of a Service, by the pod's service account or else the kubeconfig. DiscoveryRefused if there is
    neither.
    """
    try:
        api_client, default = load_client()
    except NoCluster as error:
        raise DiscoveryRefused(str(error)) from error
    return ClusterSlices(api_client, namespace=namespace or default, service=service)


def _events(response: urllib3.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON lines of a watch, each as soon as it is whole. ValueError for a line that is no event."""
    rest = b""
    for part in response.stream(65536, decode_content=True):
        *lines, rest = (rest + part).split(b"\n")
        for line in filter(None, lines):
            event = json.loads(line)
            if not isinstance(event, dict) or not isinstance(event.get("object"), dict):
                raise ValueError(f"{line[:80]!r} is no watch event")
            yield event
    if rest.strip():
        raise ValueError("it ended in the middle of an event")
