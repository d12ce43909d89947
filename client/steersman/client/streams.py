"""What calls with a request stream need beside `calls`: true endings, and errors of the source of the requests."""

from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Generic, TypeVar

import grpc
import grpc.aio

T = TypeVar("T")

_WRITE_FAILED: Final = "Internal error from Core"


async def each(source: AsyncIterable[T] | Iterable[T]) -> AsyncIterator[T]:
    """The items of either kind of iterable."""
    if isinstance(source, AsyncIterable):
        async for item in source:
            yield item
    else:
        for item in source:
            yield item


class Endings:
    """How an asyncio call with a request stream ended, as the server said it.

    When the server ends a call while a message is being written, grpc.aio sets the status twice: to what the server
    sent, and to INTERNAL ("Internal error from Core") for the failed write, in either order. What the server sent is
    the truth, so every status is noted when it is set.
    """

    def __init__(self, call: Any) -> None:
        self._seen: list[grpc.aio.AioRpcError] = []
        call.add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        # The status is there when this is called, so these coroutines end without waiting.
        code, details, trailer = (_now(part()) for part in (call.code, call.details, call.trailing_metadata))
        self._seen.append(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailer, details, None))

    @contextmanager
    def told(self) -> Iterator[None]:
        """Replaces the error of a failed write by the server's."""
        try:
            yield
        except grpc.RpcError as error:
            told = [
                end for end in self._seen if end.details() != _WRITE_FAILED and end.code() is not grpc.StatusCode.OK
            ]
            raise (told[0] if told else error) from None


def _now(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError("the call has no status yet")


class Remembering(Generic[T]):
    """An iterator that keeps the error its source raised; a blocking call would log it and lose it."""

    def __init__(self, source: Iterator[T]) -> None:
        self._source = source
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return next(self._source)
        except StopIteration:
            raise
        except Exception as error:
            self._error = error
            raise

    def raise_error(self) -> None:
        """Raises the error of the source, if there was one."""
        if self._error is not None:
            raise self._error from None
