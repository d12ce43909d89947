"""One stream of chunks from this process, watched for standing still."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from steersman.client.types import PushReceipt, RelayHop, WeightChunk
from steersman.trainer.weights.ports import WeightPort
from steersman.wire.errors import Reason, SteersmanError


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a push sent: what the replica says of it, and the bytes of chunk data that left."""

    receipt: PushReceipt
    num_bytes: int


async def stream(
    port: WeightPort,
    push_id: str,
    chunks: AsyncIterator[WeightChunk],
    *,
    relay: Sequence[RelayHop] = (),
    patience_seconds: float | None = None,
) -> Sent:
    """Sends chunks as one stream. DEADLINE_EXCEEDED if the replica takes none of them for `patience_seconds`."""
    watch = _Watch(chunks)
    push = asyncio.ensure_future(port.push(push_id, watch.chunks(), relay=relay))
    try:
        while not push.done() and patience_seconds is not None:
            if watch.waited_seconds >= patience_seconds:
                raise SteersmanError(
                    Reason.DEADLINE_EXCEEDED,
                    f"{port.target} took nothing for {patience_seconds:g} s, with others behind it",
                )
            await asyncio.wait([push], timeout=patience_seconds - watch.waited_seconds)
        return Sent(receipt=await push, num_bytes=watch.num_bytes)
    finally:
        push.cancel()
        await asyncio.wait([push])


class _Watch:
    """Chunks on their way to one stream: how many bytes, and how long the next one has not been asked for."""

    def __init__(self, chunks: AsyncIterator[WeightChunk]) -> None:
        self._chunks = chunks
        self._since: float | None = time.monotonic()
        self.num_bytes = 0

    @property
    def waited_seconds(self) -> float:
        """Since the last chunk was handed over, if that is all that happens; 0 while the next is being made."""
        return time.monotonic() - self._since if self._since is not None else 0.0

    async def chunks(self) -> AsyncIterator[WeightChunk]:
        """The same chunks."""
        self._since = None
        async for chunk in self._chunks:
            self.num_bytes += len(chunk.data)
            self._since = time.monotonic()
            yield chunk
            self._since = None
        self._since = time.monotonic()
