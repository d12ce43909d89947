"""The watch over EndpointSlices, by the official client over HTTP, against a server that does what the API's
documentation says.
"""

import asyncio
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server import END, ApiServer, Refusal
from followed import following
from slice_objects import endpoint, endpoint_slice

from steersman.trainer.discovery import cluster, endpoint_slices
from steersman.trainer.discovery.ports import DiscoveryRefused

ONE = ("10.0.0.1:50051",)
TWO = ("10.0.0.1:50051", "10.0.0.2:50051")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ApiServer]:
    """An API server, and a kubeconfig that leads there."""
    monkeypatch.setattr(endpoint_slices, "_BETWEEN_WATCHES_SECONDS", 0.01)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with ApiServer() as running:
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
        (tmp_path / "config").write_text(json.dumps(running.kubeconfig()), encoding="utf-8")
        yield running


async def test_slices_that_come_change_and_go_are_followed(server: ApiServer) -> None:
    server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
    async with following() as found:
        assert await found.next() == ONE
        server.put(endpoint_slice("b", [endpoint("10.0.0.2")]))
        assert await found.next() == TWO
        server.put(endpoint_slice("a", [endpoint("10.0.0.1", ready=False)]))
        assert await found.next() == ("10.0.0.2:50051",)
        server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
        assert await found.next() == TWO
        server.delete("b")
        assert await found.next() == ONE
        server.delete("a")
        assert await found.next() == ()
        assert "no EndpointSlices: is there a Service?" in found.discovery.problem
    assert server.requests == ["list", "watch 101"]


async def test_a_rolling_restart_takes_out_what_terminates(server: ApiServer) -> None:
    server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
    async with following() as found:
        assert await found.next() == ONE
        server.put(endpoint_slice("a", [endpoint("10.0.0.1"), endpoint("10.0.0.2", ready=False)]))
        server.put(endpoint_slice("a", [endpoint("10.0.0.1"), endpoint("10.0.0.2")]))
        assert await found.next() == TWO
        server.put(endpoint_slice("a", [endpoint("10.0.0.1", terminating=True), endpoint("10.0.0.2")]))
        assert await found.next() == ("10.0.0.2:50051",)


async def test_a_service_without_ready_endpoints_has_none_and_says_so(server: ApiServer) -> None:
    server.put(endpoint_slice("a", [endpoint("10.0.0.1", ready=False)]))
    async with following("k8s:///rl/policy:grpc") as found:
        assert await found.next() == ()
        assert found.discovery.problem == "k8s:///rl/policy:grpc: 1 endpoints, none ready"
        server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
        assert await found.next() == ONE
        assert found.discovery.problem == ""


async def test_a_watch_that_ended_goes_on_where_the_last_event_or_bookmark_was(server: ApiServer) -> None:
    server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
    async with following() as found:
        assert await found.next() == ONE
        await asyncio.to_thread(server.wait_for, 1, "watch")
        server.bookmark()
        server.cut(END)
        await asyncio.to_thread(server.wait_for, 2, "watch")
        server.put(endpoint_slice("b", [endpoint("10.0.0.2")]))
        assert await found.next() == TWO
        server.cut(END)
        await asyncio.to_thread(server.wait_for, 3, "watch")
    assert server.requests == ["list", "watch 101", "watch 111", "watch 112"]


async def test_a_version_that_the_server_has_forgotten_is_listed_anew(server: ApiServer) -> None:
    server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
    async with following() as found:
        assert await found.next() == ONE
        await asyncio.to_thread(server.wait_for, 1, "watch")
        with server.at_once():
            server.refusals["watch"] = [Refusal(503, "starting")] * 2
            server.cut()
            server.put(endpoint_slice("b", [endpoint("10.0.0.2")]))
            server.delete("a")
            server.forget()
        assert await found.next() == ("10.0.0.2:50051",)
        await asyncio.to_thread(server.wait_for, 4, "watch")
    assert server.requests[-1] == f"watch {server.version}"


async def test_gone_in_the_stream_and_gone_as_an_answer_both_list_anew(server: ApiServer) -> None:
    server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
    server.refusals["watch"] = [Refusal(410, "too old resource version")]
    async with following() as found:
        assert await found.next() == ONE
        await asyncio.to_thread(server.wait_for, 2, "watch")
        with server.at_once():
            server.forget()
            server.cut(END)
            server.put(endpoint_slice("b", [endpoint("10.0.0.2")]))
        assert await found.next() == TWO
        await asyncio.to_thread(server.wait_for, 4, "watch")
    assert server.requests == ["list", "watch 101", "list", "watch 101", "watch 101", "list", "watch 103"]


async def test_a_connection_that_breaks_changes_nothing_until_the_server_says_so(server: ApiServer) -> None:
    server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
    async with following() as found:
        assert await found.next() == ONE
        await asyncio.to_thread(server.wait_for, 1, "watch")
        server.refusals["list"] = [Refusal(503, page=b"<html>bad gateway</html>")] * 5
        server.cut()
        await found.problem("Service Unavailable")
        server.put(endpoint_slice("b", [endpoint("10.0.0.2")]))
        assert await found.next() == TWO
        assert found.discovery.problem == ""


async def test_a_line_that_is_no_event_is_a_broken_connection(server: ApiServer) -> None:
    server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
    async with following() as found:
        assert await found.next() == ONE
        await asyncio.to_thread(server.wait_for, 1, "watch")
        server.send_raw(b'["no event"]\n')
        await asyncio.to_thread(server.wait_for, 2, "list")
        await asyncio.to_thread(server.wait_for, 2, "watch")
        server.put(endpoint_slice("b", [endpoint("10.0.0.2")]))
        assert await found.next() == TWO


async def test_a_busy_server_is_asked_again_when_it_wants_to_be(server: ApiServer) -> None:
    server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
    server.refusals["list"] = [Refusal(429, "too many requests", {"Retry-After": "1"})]
    waits: list[float] = []

    def pause(stopped: threading.Event, seconds: float) -> None:
        waits.append(seconds)

    async with following(pause=pause) as found:
        assert await found.next() == ONE
    assert waits[0] == 1.0


async def test_a_grant_that_is_missing_is_told_with_what_to_grant(server: ApiServer) -> None:
    message = 'endpointslices.discovery.k8s.io is forbidden: User "system:serviceaccount:rl:default" cannot list'
    server.refusals["list"] = [Refusal(403, message)] * 10
    async with following() as found:
        with pytest.raises(DiscoveryRefused) as raised:
            await found.next()
    text = str(raised.value)
    assert message in text
    assert (
        'namespace rl with apiGroups ["discovery.k8s.io"], resources ["endpointslices"], verbs ["list", "watch"]'
        in text
    )
    assert len(server.requests) == 4  # a grant made a moment ago may take a moment to count


async def test_a_grant_that_is_taken_away_in_mid_run_keeps_the_last_answer(server: ApiServer) -> None:
    server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
    async with following() as found:
        assert await found.next() == ONE
        await asyncio.to_thread(server.wait_for, 1, "watch")
        server.refusals["list"] = [Refusal(403, "forbidden")] * 8
        server.cut()
        await found.problem("403: forbidden")
        server.put(endpoint_slice("b", [endpoint("10.0.0.2")]))
        assert await found.next() == TWO


async def test_watching_without_the_right_to_watch_is_told_and_followed_by_lists(server: ApiServer) -> None:
    server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
    server.refusals["watch"] = [Refusal(403, "cannot watch")] * 3
    async with following() as found:
        assert await found.next() == ONE
        await found.problem("403: cannot watch")
        server.put(endpoint_slice("b", [endpoint("10.0.0.2")]))
        assert await found.next() == TWO


async def test_a_token_that_was_replaced_is_read_anew(server: ApiServer, tmp_path: Path) -> None:
    server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
    async with following() as found:
        assert await found.next() == ONE
        await asyncio.to_thread(server.wait_for, 1, "watch")
        server.expected_token = "another secret"
        (tmp_path / "config").write_text(json.dumps(server.kubeconfig()), encoding="utf-8")
        server.cut()
        server.put(endpoint_slice("b", [endpoint("10.0.0.2")]))
        assert await found.next() == TWO


async def test_a_server_that_cannot_be_reached_is_told_and_waited_for(server: ApiServer, tmp_path: Path) -> None:
    right = (tmp_path / "config").read_text(encoding="utf-8")
    (tmp_path / "config").write_text(right.replace(server.url, "http://127.0.0.1:9"), encoding="utf-8")
    server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
    async with following() as found:
        answer = asyncio.create_task(found.next())
        await found.problem("the API server does not answer")
        assert not answer.done()
        (tmp_path / "config").write_text(right, encoding="utf-8")
        assert await answer == ONE


async def test_without_a_cluster_it_is_refused_at_once(server: ApiServer, tmp_path: Path) -> None:
    (tmp_path / "config").unlink()
    async with following() as found:
        with pytest.raises(DiscoveryRefused, match="no way to the Kubernetes API: not in a pod .* KUBECONFIG"):
            await found.next()


async def test_without_the_package_it_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "steersman.trainer.discovery.cluster", None)
    async with following() as found:
        with pytest.raises(DiscoveryRefused, match="pip install kubernetes"):
            await found.next()


async def test_a_wrong_port_is_told_with_those_that_are_there(server: ApiServer) -> None:
    server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
    async with following("k8s:///policy:80") as found:
        assert await found.next() == ()
        assert "port is 80, the pods' ports are grpc=50051" in found.discovery.problem


async def test_it_ends_while_it_waits_for_the_server_and_while_it_waits_to_ask_again(server: ApiServer) -> None:
    server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
    async with following() as found:  # the end asserts that the thread is gone
        assert await found.next() == ONE
        await asyncio.to_thread(server.wait_for, 1, "watch")
    server.refusals["list"] = [Refusal(429, "busy", {"Retry-After": "50"})]
    async with following() as found:
        answer = asyncio.create_task(found.next())
        await found.problem("429: busy")
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
async def test_over_tls_it_follows_and_ends_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=api.test "
        "-addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem"
    )
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True, timeout=60)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    with ApiServer((tmp_path / "cert.pem", tmp_path / "key.pem")) as server:
        (tmp_path / "config").write_text(json.dumps(server.kubeconfig()), encoding="utf-8")
        server.put(endpoint_slice("a", [endpoint("10.0.0.1")]))
        async with following() as found:
            assert await found.next() == ONE
            await asyncio.to_thread(server.wait_for, 1, "watch")
            server.put(endpoint_slice("b", [endpoint("10.0.0.2")]))
            assert await found.next() == TWO


def test_in_a_pod_the_service_account_and_its_namespace_are_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in {"token": "secret", "ca.crt": "a certificate", "namespace": "rl\n"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setattr("steersman.cluster.api._NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    settings = []
    monkeypatch.setattr(cluster.client, "ApiClient", lambda made: settings.append(made))
    monkeypatch.setattr(cluster.client, "DiscoveryV1Api", lambda _: FakeApi())
    assert cluster.connect("policy", None).namespace == "rl"
    assert cluster.connect("policy", "other").namespace == "other"
    assert settings[0].host == "https://10.96.0.1:443"
    assert settings[0].ssl_ca_cert == str(tmp_path / "ca.crt")


class FakeApi:
    """Is not asked."""

    list_namespaced_endpoint_slice = None
