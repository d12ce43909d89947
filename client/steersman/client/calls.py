"""What every client does around a call: deadline, request id, error translation, waiting out a full queue.

Every call has a deadline; retries and waits spend from it. A failure is a `SteersmanError`. Cancelling the awaiting
task cancels the RPC and stays `asyncio.CancelledError`; a cancellation by the *server* is a `SteersmanError`.
"""

import asyncio
import random
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, ClassVar, Final, Self, TypeVar

import grpc
import grpc.aio

from steersman.client.channel import MAX_BACKOFF_SECONDS, ChannelSettings, Credentials, open_aio_channel, open_channel
from steersman.wire.errors import Code, Reason, SteersmanError
from steersman.wire.status import DETAILS_TRAILER, decode_error

REQUEST_ID_KEY: Final = "x-request-id"
# grpc-stubs do not know it.
EOF: Final[Any] = grpc.aio.EOF  # type: ignore[attr-defined]
T = TypeVar("T")

# Set it to send the same id with several calls; without it every call gets a fresh one.
request_id: ContextVar[str | None] = ContextVar("steersman_client_request_id", default=None)


def call_metadata() -> tuple[tuple[str, str], ...]:
    """Metadata of one call: the request id."""
    return ((REQUEST_ID_KEY, request_id.get() or uuid.uuid4().hex),)


class Deadline:
    """A point in time that retries and waits of one call share."""

    def __init__(self, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"timeout is {seconds}, allowed: above 0 seconds")
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, at least a millisecond, so that gRPC itself reports a deadline that has passed."""
        return max(self._end - time.monotonic(), 1e-3)

    def wait_for(self, error: SteersmanError) -> float:
        """How long to wait before another try after `error`; raises it if there is to be none.

        Only a RESOURCE_EXHAUSTED whose server says when to come back is waited out, and only within the deadline.
        """
        delay = error.retry_after_seconds
        if error.code != Code.RESOURCE_EXHAUSTED or delay is None or delay >= self.remaining():
            raise error
        return delay


class StreamPatience:
    """When a server stream that brought no message yet is asked for again: on UNAVAILABLE, and on a full queue.

    Streams are retried here and not by the service config: in grpcio 1.85 a blocking stream whose last attempt finds no
    connection never ends, not even at its deadline.
    """

    def __init__(self, deadline: Deadline, settings: ChannelSettings) -> None:
        self._deadline = deadline
        self._retries_left = settings.retry_attempts - 1
        self._backoff = settings.retry_initial_backoff_seconds

    def wait_for(self, error: SteersmanError) -> float:
        """How long to wait before another try after `error`; raises it if there is to be none."""
        if error.code != Code.UNAVAILABLE:
            return self._deadline.wait_for(error)
        delay = self._backoff * random.uniform(0.8, 1.2)
        if self._retries_left == 0 or delay >= self._deadline.remaining():
            raise error
        self._retries_left -= 1
        self._backoff = min(2.0 * self._backoff, MAX_BACKOFF_SECONDS)
        return delay


def from_rpc_error(error: Any, target: str, metadata: Sequence[tuple[str, str]]) -> SteersmanError:
    """The error behind a `grpc.RpcError`, with the request id as a note."""
    details = next((value for key, value in error.trailing_metadata() or () if key == DETAILS_TRAILER), None)
    found = decode_error(error.code().value[0], error.details() or "", details)
    if found.reason is None:
        # gRPC's own texts ("Deadline Exceeded") do not say who failed.
        message = found.message or found.code.name
        found = SteersmanError(
            None, f"{target}: {message}", code=found.code, retry_after_seconds=found.retry_after_seconds
        )
    for key, value in metadata:
        found.add_note(f"{key}: {value}")
    return found


@contextmanager
def translated(target: str, metadata: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Turns errors of gRPC into `SteersmanError`."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, target, metadata) from error
    except asyncio.CancelledError:
        # grpc.aio raises CancelledError also when the server sent CANCELLED; that must not end the caller's task.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise SteersmanError(Reason.CANCELLED, f"{target}: the server cancelled the call") from None


class AsyncClient:
    """Base of the asyncio clients. The channel opens with the first call; `close` or `async with` ends it.

    Args:
        target: `host:port`, `dns:///name:port`, or several `a:1,b:2`; calls go round robin over all addresses.
        credentials: TLS, mutual TLS, bearer token; None: in the clear.
        timeout: seconds for each call that names none.
        settings: transport settings.
    """

    default_timeout: ClassVar[float] = 60.0
    _stub_type: ClassVar[Any]  # what grpc generated: called with a channel

    def __init__(
        self,
        target: str,
        *,
        credentials: Credentials | None = None,
        timeout: float | None = None,
        settings: ChannelSettings | None = None,
    ) -> None:
        self.target = target
        self.timeout = self.default_timeout if timeout is None else timeout
        self._credentials = credentials
        self._settings = settings or ChannelSettings()
        self._channel: grpc.aio.Channel | None = None
        self._stub_value: Any = None

    @property
    def _stub(self) -> Any:
        if self._channel is None:
            self._channel = open_aio_channel(self.target, self._credentials, self._settings)
            self._stub_value = self._stub_type(self._channel)
        return self._stub_value

    async def close(self) -> None:
        """Closes the connections; calls under way are cancelled. The next call would open them again."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline(self.timeout if timeout is None else timeout)

    async def _call(self, method: Any, request: Any, timeout: float | Deadline | None) -> Any:
        """One unary call; a full queue is waited out within the deadline."""
        deadline = timeout if isinstance(timeout, Deadline) else self._deadline(timeout)
        metadata = call_metadata()
        while True:
            try:
                with translated(self.target, metadata):
                    return await method(request, timeout=deadline.remaining(), metadata=metadata)
            except SteersmanError as error:
                await asyncio.sleep(deadline.wait_for(error))

    async def _stream(
        self, method: Any, request: Any, timeout: float | None, *, retry: bool = False
    ) -> AsyncGenerator[Any, None]:
        """The messages of a server stream. With `retry`, it is asked for again as `StreamPatience` says."""
        deadline, metadata = self._deadline(timeout), call_metadata()
        patience = StreamPatience(deadline, self._settings)
        begun = False
        while True:
            call = method(request, timeout=deadline.remaining(), metadata=metadata)
            try:
                while True:
                    with translated(self.target, metadata):
                        response = await call.read()
                    if response is EOF:
                        return
                    begun = True
                    yield response
            except SteersmanError as error:
                if begun or not retry:
                    raise
                delay = patience.wait_for(error)
            finally:
                call.cancel()
            await asyncio.sleep(delay)


class Client:
    """Base of the blocking clients; safe to share between threads. Arguments as for the asyncio clients."""

    default_timeout: ClassVar[float] = 60.0
    _stub_type: ClassVar[Any]  # what grpc generated: called with a channel

    def __init__(
        self,
        target: str,
        *,
        credentials: Credentials | None = None,
        timeout: float | None = None,
        settings: ChannelSettings | None = None,
    ) -> None:
        self.target = target
        self.timeout = self.default_timeout if timeout is None else timeout
        self._settings = settings or ChannelSettings()
        self._channel = open_channel(target, credentials, self._settings)
        self._stub: Any = self._stub_type(self._channel)

    def close(self) -> None:
        """Closes the connections; calls under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline(self.timeout if timeout is None else timeout)

    def _call(self, method: Any, request: Any, timeout: float | Deadline | None) -> Any:
        """One unary call; a full queue is waited out within the deadline."""
        deadline = timeout if isinstance(timeout, Deadline) else self._deadline(timeout)
        metadata = call_metadata()
        while True:
            try:
                with translated(self.target, metadata):
                    return method(request, timeout=deadline.remaining(), metadata=metadata)
            except SteersmanError as error:
                time.sleep(deadline.wait_for(error))

    def _stream(
        self, method: Any, request: Any, timeout: float | None, *, retry: bool = False
    ) -> Generator[Any, None, None]:
        """The messages of a server stream. With `retry`, it is asked for again as `StreamPatience` says."""
        deadline, metadata = self._deadline(timeout), call_metadata()
        patience = StreamPatience(deadline, self._settings)
        begun = False
        while True:
            call = method(request, timeout=deadline.remaining(), metadata=metadata)
            try:
                while True:
                    with translated(self.target, metadata):
                        response = next(call, None)
                    if response is None:
                        return
                    begun = True
                    yield response
            except SteersmanError as error:
                if begun or not retry:
                    raise
                delay = patience.wait_for(error)
            finally:
                call.cancel()
            time.sleep(delay)


async def gather_bounded(tasks: Sequence[Callable[[], Awaitable[T]]], limit: int) -> list[T]:
    """Results in the order of `tasks`, of which at most `limit` run at once. The first failure cancels the rest."""
    slots = asyncio.Semaphore(limit)

    async def run(task: Callable[[], Awaitable[T]]) -> T:
        async with slots:
            return await task()

    failed: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(run(task)) for task in tasks]
    except* SteersmanError as failures:
        failed = failures.exceptions[0]
    # Not in the handler: before Python 3.11.4 what is raised there comes out wrapped in a group.
    if failed is not None:
        raise failed
    return [task.result() for task in running]


def map_bounded(tasks: Sequence[Callable[[], T]], limit: int) -> list[T]:
    """`gather_bounded` for blocking calls, in threads. After a failure no further task starts."""
    if len(tasks) == 1:
        return [tasks[0]()]
    pool = ThreadPoolExecutor(max_workers=min(limit, max(len(tasks), 1)), thread_name_prefix="steersman-client")
    try:
        return [future.result() for future in [pool.submit(task) for task in tasks]]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
