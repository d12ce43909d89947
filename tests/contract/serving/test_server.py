"""The serving runtime against a real grpc.aio server and real clients."""

import asyncio
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from steersman.serving.metrics import Metrics
from steersman.serving.server import PortInUse, RunningServer, check_port, start_server
from steersman.serving.service import EngineDead
from steersman.serving.settings import ServerSettings
from steersman.v1 import policy_pb2, policy_pb2_grpc
from steersman.wire.errors import invalid_field, queue_full

NAME = policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name


class Servicer(policy_pb2_grpc.PolicyServiceServicer):
    """Fails or waits as the test says."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.closed_streams = 0
        self.peers: list[str] = []

    async def GetModel(self, request, context):
        self.peers.append(context.peer())
        self.entered.set()
        if self.error is not None:
            raise self.error
        await self.release.wait()
        return policy_pb2.PolicyServiceGetModelResponse()

    async def Generate(self, request, context) -> AsyncIterator[policy_pb2.GenerateResponse]:
        try:
            for index in range(1000):
                yield policy_pb2.GenerateResponse(sample_index=index)
                self.entered.set()
                await self.release.wait()
        finally:
            self.closed_streams += 1


class FakeService:
    """A service that records what the runtime asks of it."""

    name = "fake"

    def __init__(self) -> None:
        self.servicer = Servicer()
        self.health_error: Exception | None = None
        self.events: list[str] = []

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(self.servicer, server)
        return [NAME]

    async def check_health(self) -> None:
        if self.health_error is not None:
            raise self.health_error

    async def drain(self) -> None:
        self.events.append("drain")

    async def close(self) -> None:
        self.events.append("close")


@asynccontextmanager
async def serving(
    service: FakeService, metrics: Metrics | None = None, **settings: float
) -> AsyncIterator[RunningServer]:
    found = ServerSettings(health_interval_seconds=0.01, **settings)
    server = await start_server(service, found, metrics or Metrics("fake"))
    try:
        yield server
    finally:
        if "close" not in service.events:
            await server.stop()


async def call(channel: grpc.aio.Channel, **options):
    stub = policy_pb2_grpc.PolicyServiceStub(channel)
    return await stub.GetModel(policy_pb2.PolicyServiceGetModelRequest(), timeout=10, **options)


async def health_statuses(channel: grpc.aio.Channel, name: str) -> AsyncIterator[int]:
    stub = health_pb2_grpc.HealthStub(channel)
    async for response in stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=10):
        yield response.status


async def until(channel: grpc.aio.Channel, wanted: int, name: str = NAME) -> None:
    async for status in health_statuses(channel, name):
        if status == wanted:
            return


async def test_health_follows_the_engine() -> None:
    service = FakeService()
    async with serving(service) as server, grpc.aio.insecure_channel(server.address) as channel:
        await until(channel, health_pb2.HealthCheckResponse.SERVING)
        service.health_error = RuntimeError("engine is busy dying")
        await until(channel, health_pb2.HealthCheckResponse.NOT_SERVING, name="")
        service.health_error = None
        await until(channel, health_pb2.HealthCheckResponse.SERVING)
        assert not server.engine_dead.is_set()
        service.health_error = EngineDead("gone")
        await asyncio.wait_for(server.engine_dead.wait(), 10)
        await until(channel, health_pb2.HealthCheckResponse.NOT_SERVING)


async def test_a_watcher_that_leaves_does_not_deafen_the_others() -> None:
    service = FakeService()
    async with serving(service) as server, grpc.aio.insecure_channel(server.address) as channel:
        await until(channel, health_pb2.HealthCheckResponse.SERVING)
        stays, leaves = health_statuses(channel, NAME), health_statuses(channel, NAME)
        assert await anext(stays) == await anext(leaves) == health_pb2.HealthCheckResponse.SERVING
        await leaves.aclose()
        # Another call after it: the server has noticed by then that the watcher left.
        await until(channel, health_pb2.HealthCheckResponse.SERVING)
        service.health_error = RuntimeError("engine is busy dying")
        assert await anext(stays) == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_drain_answers_calls_in_flight_after_health_turned() -> None:
    service = FakeService()
    async with serving(service) as server, grpc.aio.insecure_channel(server.address) as channel:
        await until(channel, health_pb2.HealthCheckResponse.SERVING)
        statuses = health_statuses(channel, NAME)
        assert await anext(statuses) == health_pb2.HealthCheckResponse.SERVING
        pending = asyncio.create_task(call(channel))
        await service.servicer.entered.wait()
        stop = asyncio.create_task(server.stop(60))
        assert await anext(statuses) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not pending.done()
        service.servicer.release.set()
        assert await pending == policy_pb2.PolicyServiceGetModelResponse()
        # The watcher stays, and does not hold the server up.
        await asyncio.wait_for(stop, 5)
        with pytest.raises(StopAsyncIteration):
            await anext(statuses)
    assert service.events == ["drain", "close"]


async def test_grace_period_is_bounded() -> None:
    service = FakeService()
    async with serving(service) as server, grpc.aio.insecure_channel(server.address) as channel:
        pending = asyncio.create_task(call(channel))
        await service.servicer.entered.wait()
        await server.stop(0.05)
        with pytest.raises(grpc.aio.AioRpcError):
            await pending


async def test_errors_carry_reason_and_violations() -> None:
    service = FakeService()
    service.servicer.error = invalid_field("sampling.temperature", -1.0, "at least 0")
    async with serving(service) as server, grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, metadata=(("x-request-id", "abc-1"),))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert dict(caught.value.trailing_metadata())["x-request-id"] == "abc-1"
        # The trailer is read with Google's own classes: what travels is the standard rich error model.
        status = rpc_status.from_call(caught.value)
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        assert status.details[0].Unpack(info)
        assert status.details[1].Unpack(bad)
        assert (info.reason, info.domain) == ("INVALID_FIELD", "steersman")
        assert bad.field_violations[0].field == "sampling.temperature"
        assert "-1.0" in bad.field_violations[0].description


async def test_full_queue_tells_when_to_retry() -> None:
    service = FakeService()
    service.servicer.error = queue_full("queue", 4, 1.5)
    async with serving(service) as server, grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel)
        retry = error_details_pb2.RetryInfo()
        status = rpc_status.from_call(caught.value)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert status.details[1].Unpack(retry)
        assert retry.retry_delay.ToTimedelta().total_seconds() == 1.5


async def test_unexpected_errors_tell_only_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    service = FakeService()
    service.servicer.error = KeyError("secret detail")
    async with serving(service) as server, grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, metadata=(("x-request-id", "find-me"),))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "find-me" in caught.value.details()
    assert "secret" not in caught.value.details()
    assert "secret detail" in caplog.text


async def test_unsafe_request_ids_are_replaced() -> None:
    service = FakeService()
    service.servicer.release.set()
    async with serving(service) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        metadata = (("x-request-id", "a" * 65),)
        pending = stub.GetModel(policy_pb2.PolicyServiceGetModelRequest(), metadata=metadata, timeout=10)
        await pending
        returned = dict(await pending.trailing_metadata())["x-request-id"]
        assert returned != "a" * 65
        assert len(returned) == 16


async def test_cancelling_a_stream_closes_the_handler_at_once() -> None:
    service = FakeService()
    metrics = Metrics("fake")
    async with serving(service, metrics) as server, grpc.aio.insecure_channel(server.address) as channel:
        stream = policy_pb2_grpc.PolicyServiceStub(channel).Generate(policy_pb2.GenerateRequest(), timeout=10)
        await stream.read()
        await service.servicer.entered.wait()
        in_flight = ("steersman_rpc_in_flight", {"method": "Generate"})
        assert metrics.registry.get_sample_value(*in_flight) == 1
        stream.cancel()
        async with asyncio.timeout(10):
            while metrics.registry.get_sample_value(*in_flight):
                await asyncio.sleep(0)
        assert service.servicer.closed_streams == 1
        labels = {"method": "Generate", "code": "CANCELLED"}
        assert metrics.registry.get_sample_value("steersman_rpc_seconds_count", labels) == 1


async def test_reflection_lists_the_services() -> None:
    async with serving(FakeService()) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for response in stub.ServerReflectionInfo(iter([request]), timeout=10):
            names = {service.name for service in response.list_services_response.service}
            assert {NAME, "grpc.health.v1.Health"} <= names
            break


async def test_metrics_are_served_on_a_port_of_their_own() -> None:
    metrics = Metrics("fake")
    endpoint = metrics.serve("127.0.0.1", 0)
    try:
        service = FakeService()
        service.servicer.release.set()
        async with serving(service, metrics) as server, grpc.aio.insecure_channel(server.address) as channel:
            await call(channel)

        def read() -> str:
            with urllib.request.urlopen(f"http://{endpoint.address}/metrics", timeout=10) as response:
                return response.read().decode()

        page = await asyncio.to_thread(read)
        assert 'steersman_rpc_seconds_count{code="OK",method="GetModel"} 1.0' in page
    finally:
        endpoint.close()


async def test_a_port_in_use_is_named() -> None:
    async with serving(FakeService()) as server:
        host, _, port = server.address.rpartition(":")
        with pytest.raises(PortInUse, match=rf"{port}.*in use"):
            check_port(host, int(port))
        with pytest.raises(PortInUse, match="^metrics_port: "):
            check_port(host, int(port), field="metrics_port")


async def test_messages_beyond_the_limit_are_refused() -> None:
    settings = ServerSettings(max_message_bytes=1024)
    server = await start_server(FakeService(), settings, Metrics("fake"))
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = policy_pb2_grpc.PolicyServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(policy_pb2.GenerateRequest(text="x" * 2048), timeout=10).read()
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("method", "data"), [("GetModel", b"\xff" * 8), ("Generate", b"\xff" * 8), ("Generate", b"\x1a\x03\xff\xfe\xfd")]
)
async def test_a_message_that_cannot_be_read_is_a_bad_field(
    method: str, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def ask(channel: grpc.aio.Channel) -> None:
        if method == "GetModel":
            await channel.unary_unary(f"/{NAME}/{method}")(data, timeout=10)
        async for _ in channel.unary_stream(f"/{NAME}/{method}")(data, timeout=10):
            pass

    async with serving(FakeService()) as server, grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(caught.value.details()).startswith(f"request is '{len(data)} bytes', allowed: the encoded request")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_connections_are_made_anew_and_calls_under_way_end_in_peace() -> None:
    service = FakeService()
    async with (
        serving(service, max_connection_age_seconds=0.1) as server,
        asyncio.timeout(20),
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        held = asyncio.create_task(call(channel))
        await service.servicer.entered.wait()
        others = []
        while len(set(service.servicer.peers)) < 2:
            others.append(asyncio.create_task(call(channel)))
            await asyncio.sleep(0.02)
        service.servicer.release.set()
        await held
        await asyncio.gather(*others)
