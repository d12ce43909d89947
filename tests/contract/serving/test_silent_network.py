"""A network that drops packets without a word: both ends notice, and neither holds on to what is lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from steersman.client import AsyncPolicyClient, ChannelSettings, SteersmanError
from steersman.client import channel as channel_module
from steersman.serving.metrics import Metrics
from steersman.serving.server import start_server
from steersman.serving.settings import ServerSettings
from steersman.v1 import policy_pb2, policy_pb2_grpc
from steersman.wire.errors import Code


class SilentNetwork:
    """Before one server. `num_connections` were made through it."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._carrying: set[asyncio.Task[None]] = set()
        self._ended = False
        self.target = ""

    def fall_silent(self) -> None:
        """From now on what is sent gets lost, on connections that there are and on new ones."""
        self._flowing.clear()

    @classmethod
    @asynccontextmanager
    async def before(cls, target: str) -> AsyncIterator["SilentNetwork"]:
        """A proxy before `target`."""
        network = cls(target)
        server = await asyncio.start_server(network._start, "127.0.0.1", 0)
        network.target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield network
        finally:
            server.close()
            network._ended = True
            for task in network._carrying:
                task.cancel()
            await asyncio.gather(*network._carrying, return_exceptions=True)

    def _start(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._ended:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._carry(reader, writer))
        # Here, since one that is cancelled before it has begun runs none of its lines.
        task.add_done_callback(lambda _: writer.transport.abort())
        self._carrying.add(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        try:
            there, back = await asyncio.open_connection(self._host, self._port)
            ends.append(back)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, back))
                group.create_task(self._pass_on(there, writer))
        finally:
            for end in ends:
                end.transport.abort()
            await asyncio.gather(*(end.wait_closed() for end in ends), return_exceptions=True)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            await self._flowing.wait()
            sink.write(data)
            await sink.drain()
        await self._flowing.wait()
        sink.close()


class Holding(policy_pb2_grpc.PolicyServiceServicer):
    """Never ends a stream by itself."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.left = asyncio.Event()

    async def Generate(self, request, context) -> AsyncIterator[policy_pb2.GenerateResponse]:
        try:
            self.entered.set()
            await asyncio.Event().wait()
            yield policy_pb2.GenerateResponse()
        finally:
            self.left.set()


class Service:
    name = "fake"

    def __init__(self) -> None:
        self.servicer = Holding()

    def register(self, server):
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(self.servicer, server)
        return ["steersman.v1.PolicyService"]

    async def check_health(self) -> None:
        pass

    async def drain(self) -> None:
        pass

    async def close(self) -> None:
        pass


@pytest.fixture
async def held() -> AsyncIterator[tuple[Holding, SilentNetwork]]:
    """A server that pings after a second, behind a network."""
    service = Service()
    server = await start_server(service, ServerSettings(keepalive_seconds=1.0), Metrics("fake"))
    try:
        async with SilentNetwork.before(server.address) as network, asyncio.timeout(60):
            yield service.servicer, network
    finally:
        await server.stop()


async def test_a_call_ends_when_the_network_falls_silent(held, monkeypatch: pytest.MonkeyPatch) -> None:
    servicer, network = held
    monkeypatch.setattr(channel_module, "MIN_KEEPALIVE_SECONDS", 0.1)
    settings = ChannelSettings(retry_attempts=1, keepalive_seconds=1.0, keepalive_timeout_seconds=0.5)
    async with AsyncPolicyClient(network.target, settings=settings) as client:
        call = asyncio.create_task(client.generate([1], timeout=600))
        await servicer.entered.wait()
        network.fall_silent()
        with pytest.raises(SteersmanError) as caught:
            await call
    assert caught.value.code is Code.UNAVAILABLE


async def test_a_server_lets_go_of_a_caller_that_is_gone_without_a_word(held) -> None:
    servicer, network = held
    async with AsyncPolicyClient(network.target, settings=ChannelSettings(retry_attempts=1)) as client:
        call = asyncio.create_task(client.generate([1], timeout=600))
        await servicer.entered.wait()
        network.fall_silent()
        await servicer.left.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)


def test_pings_more_often_than_servers_bear_are_refused() -> None:
    with pytest.raises(ValueError, match="keepalive_seconds is 1.0, allowed: at least 5"):
        ChannelSettings(keepalive_seconds=1.0)
