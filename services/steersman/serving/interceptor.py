"""What happens around every call: request id, metrics, log line, and the one place where errors are translated.

Servicers raise `SteersmanError`; nothing else that they raise reaches a caller. An unexpected exception is logged with
its traceback under the request id, and the caller is told only that id.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing, asynccontextmanager
from typing import Any, Final, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError

from steersman.serving.logging import request_id
from steersman.serving.metrics import Metrics
from steersman.serving.security.access import bearer_token
from steersman.serving.security.gate import Gate
from steersman.serving.security.tls import certificate_names
from steersman.wire.errors import Code, Reason, SteersmanError, invalid_field
from steersman.wire.status import DETAILS_TRAILER, encode_details

REQUEST_ID_KEY: Final = "x-request-id"
_VALID_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_FOREIGN: Final = "/grpc."
_STATUS_OF: Final = {status.value[0]: status for status in grpc.StatusCode}

logger = logging.getLogger(__name__)

# Quoted: the stubs are generic, the classes at run time are not.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps the methods that servicers of ours answer; health and reflection pass as they are."""

    def __init__(self, metrics: Metrics, gate: Gate) -> None:
        self._metrics = metrics
        self._gate = gate

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        """Returns the handler of the method with everything around it."""
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_FOREIGN):
            return cast(Handler, handler)
        if handler.response_streaming:
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
            behaviour: Any = self._wrap_stream(method, inner)
        else:
            inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
            behaviour = self._wrap_unary(method, inner)
        kind = (
            ("stream" if handler.request_streaming else "unary")
            + "_"
            + ("stream" if handler.response_streaming else "unary")
        )
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return cast(Handler, make(behaviour, _decoder(handler.request_deserializer), handler.response_serializer))

    def _wrap_unary(self, method: str, inner: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async with self._around(method, context):
                return await inner(_decoded(request), context)

        return call

    def _wrap_stream(
        self, method: str, inner: Callable[..., AsyncGenerator[Any, None]]
    ) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            async with self._around(method, context), aclosing(inner(_decoded(request), context)) as responses:
                async for response in responses:
                    yield response

        return call

    @asynccontextmanager
    async def _around(self, path: str, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
        method = path.rpartition("/")[2]
        identifier = accept_request_id(_metadata(context, REQUEST_ID_KEY))
        token = request_id.set(identifier)
        in_flight = self._metrics.rpc_in_flight.labels(method)
        in_flight.inc()
        start = time.perf_counter()
        code = Code.OK
        try:
            with self._admit(path, context):
                yield
            context.set_trailing_metadata(((REQUEST_ID_KEY, identifier),))
        except (asyncio.CancelledError, GeneratorExit):
            code = Code.CANCELLED
            raise
        except grpc.aio.AbortError:
            code = Code.UNKNOWN
            raise
        except Exception as error:
            public = translate(error, identifier)
            code = public.code
            logger.info("call failed", extra={"method": method, "code": code.name, "why": str(public)})
            trailers = ((REQUEST_ID_KEY, identifier), (DETAILS_TRAILER, encode_details(public)))
            await context.abort(_STATUS_OF[int(code)], public.message, trailers)
        finally:
            elapsed = time.perf_counter() - start
            in_flight.dec()
            self._metrics.rpc_seconds.labels(method, code.name).observe(elapsed)
            logger.debug("call", extra={"method": method, "code": code.name, "seconds": round(elapsed, 6)})
            _reset(token)

    def _admit(self, path: str, context: grpc.aio.ServicerContext[Any, Any]) -> AbstractContextManager[str]:
        return self._gate.admit(
            path,
            token=bearer_token(_metadata(context, "authorization")),
            certificate_names=certificate_names(context.auth_context()),
            address=_host(context.peer()),
        )


class _Undecodable:
    """Stands for a message that is none of the method's, until the call is under way and can be answered in order."""

    def __init__(self, data: bytes) -> None:
        self.error = invalid_field(
            "request", f"{len(data)} bytes", "the encoded request message of the method, its text in UTF-8"
        )


def _decoder(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Undecodable(data)

    return decode


def _decoded(request: Any) -> Any:
    """A message, or a stream of them, that is what the method takes. Raises INVALID_FIELD if it is not."""
    if isinstance(request, _Undecodable):
        raise request.error
    return _decoded_stream(request) if hasattr(request, "__aiter__") else request


async def _decoded_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _decoded(request)


def translate(error: Exception, identifier: str) -> SteersmanError:
    """The public form of an exception. What is not a `SteersmanError` is logged and named by request id only."""
    if isinstance(error, SteersmanError):
        return error
    if isinstance(error, TimeoutError):
        return SteersmanError(Reason.DEADLINE_EXCEEDED, "the deadline passed before the work was done")
    logger.error("unexpected error", exc_info=error)
    return SteersmanError(Reason.INTERNAL, f"internal error; the server's log has it under request id {identifier}")


def accept_request_id(given: str | None) -> str:
    """The caller's request id, or a new one if it sent none that is safe to log."""
    return given if given is not None and _VALID_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex[:16]


def _metadata(context: grpc.aio.ServicerContext[Any, Any], key: str) -> str | None:
    """The first value of a key that the caller sent."""
    for found, value in context.invocation_metadata() or ():
        if found == key and isinstance(value, str):
            return value
    return None


def _host(peer: str) -> str:
    """The address of a peer (`ipv4:10.0.0.1:4711`) without its port, which each connection has anew."""
    return peer.rpartition(":")[0]


def _reset(token: Any) -> None:
    """Restores the request id; an async generator may be closed in another context, where there is nothing to do."""
    try:
        request_id.reset(token)
    except ValueError:
        return
