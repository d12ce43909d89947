"""Merged streams end as one, and groups of tensors keep their order."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.policy.engine.port import SampleDelta, TensorSlot
from steersman.policy.engine.streams import groups_of, merge, stream_interval


def delta(index: int, token: int) -> SampleDelta:
    return SampleDelta(index=index, token_ids=[token], logprobs=[0.0], versions=())


class Source:
    """A stream that can be held, can fail, and tells whether it was closed."""

    def __init__(self, index: int, num_deltas: int, *, fails: bool = False) -> None:
        self._index, self._num_deltas, self._fails = index, num_deltas, fails
        self.gate = asyncio.Event()
        self.closed = False
        self.num_sent = 0

    async def stream(self) -> AsyncGenerator[SampleDelta, None]:
        try:
            for token in range(self._num_deltas):
                await self.gate.wait()
                self.num_sent += 1
                yield delta(self._index, token)
            if self._fails:
                raise LookupError("broken")
        finally:
            self.closed = True


async def test_deltas_come_as_they_are_made() -> None:
    first, second = Source(0, 2), Source(1, 2)
    merged = merge([first.stream(), second.stream()])
    second.gate.set()
    assert [(await anext(merged)).index for _ in range(2)] == [1, 1]
    first.gate.set()
    assert [item.token_ids[0] async for item in merged] == [0, 1]
    assert first.closed
    assert second.closed


async def test_an_error_ends_all_streams() -> None:
    held, broken = Source(0, 1), Source(1, 1, fails=True)
    broken.gate.set()
    merged = merge([held.stream(), broken.stream()])
    assert (await anext(merged)).index == 1
    with pytest.raises(LookupError):
        await anext(merged)
    assert held.closed


async def test_closing_ends_all_streams_wherever_they_wait() -> None:
    held, eager = Source(0, 1), Source(1, 1000)
    eager.gate.set()
    merged = merge([held.stream(), eager.stream()])
    await anext(merged)
    await merged.aclose()
    assert held.closed
    assert eager.closed


async def test_a_slow_reader_holds_the_streams_back() -> None:
    source = Source(0, 1000)
    source.gate.set()
    merged = merge([source.stream()])
    await anext(merged)
    for _ in range(100):
        await asyncio.sleep(0)
    assert source.num_sent < 10
    await merged.aclose()


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 60))
def test_groups_hold_every_tensor_once_in_order(sizes: list[int], max_bytes: int) -> None:
    slots = [
        TensorSlot(name=str(index), dtype="uint8", shape=(size,), offset_bytes=0, nbytes=size)
        for index, size in enumerate(sizes)
    ]
    groups = list(groups_of(slots, max_bytes))
    assert [slot for group in groups for slot in group] == slots
    assert all(sum(slot.nbytes for slot in group) <= max_bytes or len(group) == 1 for group in groups)
    assert all(groups)


def test_deltas_grow_with_the_load() -> None:
    assert [stream_interval(running) for running in (0, 15, 16, 64, 100_000)] == [1, 1, 2, 5, 8]
