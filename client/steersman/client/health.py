"""Asks `grpc.health.v1` of a server, without the health package: its two messages have one field each."""

import time
from enum import IntEnum
from typing import Any, Final

from steersman.client.calls import AsyncClient, Client
from steersman.wire.errors import Code, SteersmanError

_METHOD: Final = "/grpc.health.v1.Health/Check"


class ServingStatus(IntEnum):
    """What a server says of a service (grpc.health.v1.HealthCheckResponse.ServingStatus)."""

    UNKNOWN = 0
    SERVING = 1
    NOT_SERVING = 2
    SERVICE_UNKNOWN = 3


def encode_request(service: str) -> bytes:
    """HealthCheckRequest{service}: field 1, length-delimited. `service` has at most 127 bytes."""
    name = service.encode()
    if len(name) > 127:
        raise ValueError(f"service has {len(name)} bytes, allowed: at most 127")
    return b"\x0a" + bytes([len(name)]) + name if name else b""


def decode_response(data: bytes) -> ServingStatus:
    """HealthCheckResponse{status}: field 1, varint; an empty message is UNKNOWN, as any value of a newer peer."""
    if len(data) == 2 and data[0] == 0x08 and data[1] in ServingStatus._value2member_map_:
        return ServingStatus(data[1])
    return ServingStatus.UNKNOWN


class _Stub:
    def __init__(self, channel: Any) -> None:
        self.Check = channel.unary_unary(
            _METHOD, request_serializer=encode_request, response_deserializer=decode_response
        )


class AsyncHealthClient(AsyncClient):
    """Asyncio health client. Calls have 5 s unless `timeout` says otherwise."""

    default_timeout = 5.0
    _stub_type = _Stub

    async def check(self, service: str = "", *, timeout: float | None = None) -> ServingStatus:
        """Status of a service by its full proto name, "" for the whole server. Raises UNAVAILABLE if none answers."""
        try:
            status: ServingStatus = await self._call(self._stub.Check, service, timeout)
        except SteersmanError as error:
            return _unless_unknown(error)
        return status


class HealthClient(Client):
    """Blocking health client. Calls have 5 s unless `timeout` says otherwise."""

    default_timeout = 5.0
    _stub_type = _Stub

    def check(self, service: str = "", *, timeout: float | None = None) -> ServingStatus:
        """Status of a service by its full proto name, "" for the whole server. Raises UNAVAILABLE if none answers."""
        try:
            status: ServingStatus = self._call(self._stub.Check, service, timeout)
        except SteersmanError as error:
            return _unless_unknown(error)
        return status

    def wait_until_serving(self, *, timeout: float) -> None:
        """Returns once the server says SERVING; asks five times a second. Raises DEADLINE_EXCEEDED."""
        end = time.monotonic() + timeout
        while True:
            try:
                status = self.check(timeout=min(2.0, max(end - time.monotonic(), 0.1)))
                if status is ServingStatus.SERVING:
                    return
                found = status.name
            except SteersmanError as error:
                found = str(error)
            if time.monotonic() >= end:
                message = f"{self.target} is not serving after {timeout:g} s ({found})"
                raise SteersmanError(None, message, code=Code.DEADLINE_EXCEEDED)
            time.sleep(0.2)


def _unless_unknown(error: SteersmanError) -> ServingStatus:
    if error.code == Code.NOT_FOUND:
        return ServingStatus.SERVICE_UNKNOWN
    raise error
