"""The command that asks the health port."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from steersman.serving.health_check import main
from steersman.serving.probe import start_probe_listener

STATUS = health_pb2.HealthCheckResponse.ServingStatus


@pytest.mark.parametrize(("status", "exit_status"), [("SERVING", 0), ("NOT_SERVING", 1)])
async def test_it_says_what_the_server_says(status: str, exit_status: int, capsys: pytest.CaptureFixture[str]) -> None:
    health = HealthServicer()
    await health.set("", STATUS.Value(status))
    listener = await start_probe_listener("127.0.0.1", 0, health)
    try:
        assert await asyncio.to_thread(main, [listener.address]) == exit_status
    finally:
        await listener.stop()
    assert capsys.readouterr().out == f"{status}\n"


async def test_it_asks_past_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    health = HealthServicer()
    await health.set("", STATUS.Value("SERVING"))
    listener = await start_probe_listener("127.0.0.1", 0, health)
    try:
        assert await asyncio.to_thread(main, [listener.address]) == 0
    finally:
        await listener.stop()


def test_where_nobody_answers_it_fails(capsys: pytest.CaptureFixture[str], unused_tcp_port: int) -> None:
    assert main([f"127.0.0.1:{unused_tcp_port}"]) == 1
    assert capsys.readouterr().out.startswith(grpc.StatusCode.UNAVAILABLE.name)


def test_more_than_one_address_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a:1", "b:2"]) == 2
    assert "HOST:PORT" in capsys.readouterr().err
