"""The hand-written health client against grpcio-health-checking."""

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from steersman.client import AsyncHealthClient, HealthClient, ServingStatus
from steersman.client.health import decode_response, encode_request
from steersman.wire.errors import Code, SteersmanError


@pytest.mark.parametrize("service", ["", "steersman.v1.PolicyService", "x" * 127])
def test_requests_are_what_protobuf_writes(service: str) -> None:
    assert encode_request(service) == health_pb2.HealthCheckRequest(service=service).SerializeToString()


@pytest.mark.parametrize("status", list(ServingStatus))
def test_responses_are_read_as_protobuf_wrote_them(status: ServingStatus) -> None:
    data = health_pb2.HealthCheckResponse(status=int(status)).SerializeToString()
    assert decode_response(data) is status


def test_a_status_of_a_newer_peer_is_unknown() -> None:
    assert decode_response(b"\x08\x63") is ServingStatus.UNKNOWN


async def test_check_tells_the_status(serve: Any) -> None:
    servicer = HealthServicer()
    address = await serve(health_pb2_grpc.add_HealthServicer_to_server, servicer)
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    await servicer.set("busy", health_pb2.HealthCheckResponse.NOT_SERVING)
    async with AsyncHealthClient(address) as client:
        assert await client.check() is ServingStatus.SERVING
        assert await client.check("busy") is ServingStatus.NOT_SERVING
        assert await client.check("nobody") is ServingStatus.SERVICE_UNKNOWN

    def wait(seconds: float) -> None:
        with HealthClient(address) as client:
            client.wait_until_serving(timeout=seconds)

    await asyncio.to_thread(wait, 10.0)
    await servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    with pytest.raises(SteersmanError, match="NOT_SERVING") as caught:
        await asyncio.to_thread(wait, 0.3)
    assert caught.value.code is Code.DEADLINE_EXCEEDED


async def test_a_server_without_health_says_so(serve: Any) -> None:
    async with AsyncHealthClient(await serve(lambda servicer, server: None, None)) as client:
        with pytest.raises(SteersmanError) as caught:
            await client.check()
    assert caught.value.code is Code(grpc.StatusCode.UNIMPLEMENTED.value[0])
