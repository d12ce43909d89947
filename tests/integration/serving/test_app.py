"""The bootstrap as a real process: start, signals, exit statuses."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steersman.cli.supervisor import free_port
from steersman.v1 import policy_pb2, policy_pb2_grpc

PROGRAM = Path(__file__).parent / "server_process.py"
DEADLINE_SECONDS = 60


@asynccontextmanager
async def process(folder: Path, port: int, *flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    arguments = [sys.executable, str(PROGRAM), "--folder", str(folder), "--port", str(port), *flags]
    child = await asyncio.create_subprocess_exec(*arguments, stderr=asyncio.subprocess.PIPE)
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def ready(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=DEADLINE_SECONDS)
    async for response in watch:
        if response.status == health_pb2.HealthCheckResponse.SERVING:
            return


async def exists(path: Path) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not path.exists():
            await asyncio.sleep(0.01)


async def end(child: asyncio.subprocess.Process) -> tuple[int, str]:
    _, errors = await asyncio.wait_for(child.communicate(), DEADLINE_SECONDS)
    assert child.returncode is not None
    return child.returncode, errors.decode()


async def test_sigterm_lets_calls_in_flight_finish(tmp_path: Path) -> None:
    port = free_port()
    async with process(tmp_path, port) as child, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await ready(channel)
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        pending = asyncio.ensure_future(stub.GetModel(policy_pb2.PolicyServiceGetModelRequest(), timeout=60))
        await exists(tmp_path / "entered")
        os.kill(child.pid, signal.SIGTERM)
        await exists(tmp_path / "drained")
        assert child.returncode is None
        (tmp_path / "answer").touch()
        assert await pending == policy_pb2.PolicyServiceGetModelResponse()
        status, log = await end(child)
    assert status == 0, log
    assert (tmp_path / "closed").exists()
    assert "draining" in log


async def test_a_dead_engine_ends_the_server(tmp_path: Path) -> None:
    port = free_port()
    async with process(tmp_path, port, "--health-interval-seconds", "0.01") as child:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await ready(channel)
        (tmp_path / "dead").touch()
        status, log = await end(child)
    assert status == 1
    assert "told to die" in log


async def test_a_port_in_use_is_said_and_nothing_is_built(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        async with process(tmp_path, port) as child:
            status, log = await end(child)
    assert status == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in log
    assert "Traceback" not in log


async def test_a_failed_start_names_the_field(tmp_path: Path) -> None:
    async with process(tmp_path / "nowhere", free_port()) as child:
        status, log = await end(child)
    assert status == 1
    assert "allowed: a folder that exists" in log
    assert "Traceback" not in log


async def test_bad_settings_exit_with_usage(tmp_path: Path) -> None:
    async with process(tmp_path, 99999) as child:
        status, log = await end(child)
    assert status == 2
    assert "port: is '99999'" in log
