"""Discovery with the token and the Role of a training job: slices that the EndpointSlice controller makes of pods.

And an API server that is stopped, and started again.
"""

import asyncio
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from control_plane import ControlPlane, Object, eventually, path_of
from followed import Following, following
from launching import ONE, Runs, SignIn, launch, until
from nodes import Nodes

from steersman.trainer.discovery import cluster, endpoint_slices
from steersman.trainer.discovery.ports import DiscoveryRefused
from steersman.trainer.discovery.slice_api import Listing, SliceApi
from steersman.trainer.jobs.kubernetes.launcher import KubernetesLauncher
from steersman.trainer.jobs.launcher import WorkerStatus
from steersman.wire.errors import Reason, SteersmanError

LABELS = {"app": "policy"}
UNPRIVILEGED = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


class Replicas:
    """Pods of the Service `policy`; number N has the address 10.1.0.N."""

    def __init__(self, plane: ControlPlane, nodes: Nodes, namespace: str) -> None:
        self._plane, self._nodes, self._namespace = plane, nodes, namespace
        # Of a headless Service, as the base's.
        ports = [{"name": "grpc", "port": 50051, "targetPort": "grpc"}]
        spec = {"clusterIP": "None", "selector": LABELS, "ports": ports}
        plane.make(namespace, {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "policy"}, "spec": spec})
        account = path_of("ServiceAccount", namespace, "default")
        eventually(lambda: plane.admin.get(account) is not None, "pods have an account")

    def add(self, number: int, *, ready: bool = True) -> None:
        ports = [{"name": "grpc", "containerPort": 50051}]
        container = {"name": "server", "image": "policy:1", "ports": ports}
        container["securityContext"] = {key: UNPRIVILEGED[key] for key in ("allowPrivilegeEscalation", "capabilities")}
        outer = {key: UNPRIVILEGED[key] for key in ("runAsNonRoot", "runAsUser", "seccompProfile")}
        spec = {"containers": [container], "securityContext": outer, "automountServiceAccountToken": False}
        metadata = {"name": f"policy-{number}", "labels": LABELS}
        self._plane.make(self._namespace, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        self._nodes.bind(f"policy-{number}")
        self.set_ready(number, ready)

    def set_ready(self, number: int, ready: bool) -> None:
        address = f"10.1.0.{number}"
        condition = {"type": "Ready", "status": str(ready)}
        status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "conditions": [condition]}
        self._nodes.say(f"policy-{number}", status)

    def wait_for_slice(self, number: int) -> None:
        """Returns once the controller has written the replica's address."""
        path = f"/apis/discovery.k8s.io/v1/namespaces/{self._namespace}/endpointslices"
        address = f"10.1.0.{number}"
        eventually(lambda: address in str(self._plane.admin.ask("GET", path)), "the slice is written")

    def terminate(self, number: int) -> None:
        """It is told to end, and drains."""
        self._plane.admin.ask("DELETE", path_of("Pod", self._namespace, f"policy-{number}"))

    def end(self, number: int) -> None:
        self._nodes.end(f"policy-{number}")


@pytest.fixture
def replicas(
    accounts: ControlPlane, nodes: Nodes, sign_in: SignIn, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> Replicas:
    """And clients sign in as a training job does."""
    monkeypatch.setattr(endpoint_slices, "_BETWEEN_WATCHES_SECONDS", 0.01)
    sign_in("training-job")
    return Replicas(accounts, nodes, namespace)


class Observed:
    """The API of the client; counts what is asked, and keeps the kinds of events."""

    def __init__(self, api: SliceApi) -> None:
        self._api = api
        self.namespace = api.namespace
        self.num_lists, self.num_watches = 0, 0
        self.events: list[str] = []

    def list_slices(self) -> Listing:
        self.num_lists += 1
        return self._api.list_slices()

    def watch_slices(self, resource_version: str) -> Iterator[Object]:
        self.num_watches += 1
        for event in self._api.watch_slices(resource_version):
            self.events.append(event["type"])
            yield event

    def interrupt(self) -> None:
        self._api.interrupt()

    def close(self) -> None:
        self._api.close()


def targets(*numbers: int) -> tuple[str, ...]:
    return tuple(f"10.1.0.{number}:50051" for number in numbers)


async def shows(found: Following, *numbers: int) -> None:
    """Returns once these replicas are shown; what is shown until then is passed over."""
    async with asyncio.timeout(120):
        while await found.next() != targets(*numbers):
            pass


async def test_a_service_that_is_scaled(replicas: Replicas) -> None:
    async with following() as found:
        await shows(found)
        replicas.add(1)
        await shows(found, 1)
        replicas.add(2, ready=False)
        replicas.add(3)
        await shows(found, 1, 3)
        replicas.set_ready(2, True)
        await shows(found, 1, 2, 3)
        replicas.set_ready(1, False)
        await shows(found, 2, 3)
        # It still serves what it has, and gets nothing new.
        replicas.terminate(3)
        await shows(found, 2)
        replicas.end(3)
        replicas.terminate(2)
        await shows(found)
        await found.problem("none ready")


async def test_a_watch_that_ends_goes_on_where_it_was(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "WATCH_SECONDS", 1)
    seen: list[Observed] = []

    def connect(service: str, namespace: str | None) -> SliceApi:
        seen.append(Observed(cluster.connect(service, namespace)))
        return seen[-1]

    replicas.add(1)
    async with following(connect=connect) as found:
        await shows(found, 1)
        async with asyncio.timeout(120):
            while seen[0].num_watches < 3:
                await asyncio.sleep(0.02)
        replicas.add(2)
        await shows(found, 1, 2)
    assert [(one.num_lists, "ERROR" in one.events) for one in seen] == [(1, False)]


async def test_a_version_that_is_too_old_is_listed_anew(
    replicas: Replicas, accounts: ControlPlane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Between two watches the API server is started again, and knows no more what was before."""
    monkeypatch.setattr(cluster, "WATCH_SECONDS", 1)
    caplog.set_level(logging.INFO, "steersman")
    seen: list[Observed] = []
    paused, go_on = threading.Event(), threading.Event()

    def connect(service: str, namespace: str | None) -> SliceApi:
        seen.append(Observed(cluster.connect(service, namespace)))
        return seen[-1]

    def pause(stopped: threading.Event, seconds: float) -> None:
        paused.set()
        assert go_on.wait(240)

    replicas.add(1)
    async with following(connect=connect, pause=pause) as found:
        try:
            await shows(found, 1)
            assert await asyncio.to_thread(paused.wait, 120)
            replicas.add(2)
            replicas.wait_for_slice(2)
            accounts.stop_api_server()
            accounts.start_api_server()
        finally:
            go_on.set()
        await shows(found, 1, 2)
    assert "listing anew" in caplog.text
    assert [one.num_lists for one in seen] == [2]


async def test_an_account_without_the_right_is_told_what_to_grant(
    replicas: Replicas, sign_in: SignIn, namespace: str
) -> None:
    sign_in("trainer")
    async with following() as found:
        with pytest.raises(DiscoveryRefused) as raised:
            await found.next()
    text = str(raised.value)
    assert f'User "system:serviceaccount:{namespace}:trainer" cannot list resource "endpointslices"' in text
    grant = 'apiGroups ["discovery.k8s.io"], resources ["endpointslices"], verbs ["list", "watch"]'
    assert f"namespace {namespace} with {grant}" in text


async def test_a_right_that_is_taken_away_and_given_back(
    replicas: Replicas, accounts: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A watch that runs goes on without the right.
    monkeypatch.setattr(cluster, "WATCH_SECONDS", 1)
    path = path_of("Role", namespace, "training-job")
    rules: list[Any] = accounts.admin.ask("GET", path)["rules"]
    replicas.add(1)
    async with following() as found:
        await shows(found, 1)
        accounts.admin.merge(path, {"rules": []})
        await found.problem('cannot watch resource "endpointslices"')
        replicas.add(2)
        accounts.admin.merge(path, {"rules": rules})
        await shows(found, 1, 2)
        await found.problem("")


async def test_an_api_server_that_is_stopped_and_started_again(
    replicas: Replicas,
    launcher: KubernetesLauncher,
    sign_in: SignIn,
    accounts: ControlPlane,
    nodes: Nodes,
    run_of: Runs,
) -> None:
    sign_in("training-job")
    handle = await launch(launcher, run_of())
    pod = nodes.pod_of(ONE)
    waiting = await launch(launcher, run_of("two"))
    nodes.run(pod)
    assert await launcher.status(handle) == WorkerStatus(alive=True)
    replicas.add(1)
    async with following() as found:
        await shows(found, 1)
        accounts.stop_api_server()
        await found.problem("the API server does not answer")
        # What is known of a worker stands; of one that waits it is said why nothing is known.
        assert await launcher.status(handle) == WorkerStatus(alive=True)
        assert "is the API server up" in (await launcher.status(waiting)).waiting
        with pytest.raises(SteersmanError, match="does not answer") as caught:
            await launch(launcher, run_of("three"))
        assert caught.value.reason is Reason.ENGINE_UNAVAILABLE
        accounts.start_api_server()
        replicas.add(2)
        await shows(found, 1, 2)
        assert found.discovery.problem == ""
    await until(launcher, waiting, lambda now: "no node has been chosen" in now.waiting)
    nodes.finish(pod, {"exitCode": 0, "reason": "Completed"})
    status = await until(launcher, handle, lambda now: not now.alive)
    assert "ended well" in status.ending
    assert (await launch(launcher, run_of("three"))).split("/")[1] == "steersman-three-1"
