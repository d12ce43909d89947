"""How an asyncio call with a request stream ended, as the server said it."""

from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final

import grpc
import grpc.aio

_WRITE_FAILED: Final = "Internal error from Core"


class Endings:
    """Notes every status of a call, and tells the true one.

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
