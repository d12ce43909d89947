"""Several streams as one, and tensors in groups: what the engine needs besides vLLM."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Final

from steersman.policy.engine.port import SampleDelta, TensorSlot

_DELTAS_AHEAD: Final = 4
"""Messages of one request that may wait for a slow reader, for each sample; then vLLM itself merges deltas.
"""


_STREAMS_PER_TOKEN_HELD: Final = 16
_MAX_TOKENS_HELD: Final = 8


def stream_interval(num_unfinished: int) -> int:
    """Tokens of one delta: 1 while few samples run, up to 8 when many do.

    A message costs about 100 us of one core, half of what a small model needs for the token. With many
    samples that would cost throughput, and nobody reads along token by token.
    """
    return min(_MAX_TOKENS_HELD, 1 + num_unfinished // _STREAMS_PER_TOKEN_HELD)


async def merge(streams: Sequence[AsyncGenerator[SampleDelta, None]]) -> AsyncGenerator[SampleDelta, None]:
    """The items of all streams as they come. The first error ends it; what is left is cancelled on the way
    out.
    """
    queue: asyncio.Queue[SampleDelta | BaseException | None] = asyncio.Queue(_DELTAS_AHEAD * len(streams))

    async def drain(stream: AsyncGenerator[SampleDelta, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    await queue.put(delta)
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    num_open = len(tasks)
    try:
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def groups_of(slots: Sequence[TensorSlot], max_bytes: int) -> Iterator[list[TensorSlot]]:
    """Runs of tensors of at most `max_bytes` together, or a single larger one."""
    group: list[TensorSlot] = []
    held = 0
    for slot in slots:
        if group and held + slot.nbytes > max_bytes:
            yield group
            group, held = [], 0
        group.append(slot)
        held += slot.nbytes
    if group:
        yield group
