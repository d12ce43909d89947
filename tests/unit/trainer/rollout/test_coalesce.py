"""When a coalescer calls."""

import asyncio
from collections.abc import Sequence

import pytest

from steersman.trainer.retry import Backoff, Waits
from steersman.trainer.rollout import coalesce
from steersman.trainer.rollout.coalesce import Coalescer


class Service:
    """Answers an item with ten times itself; notes the calls, and lets them end when told to."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def call(self, items: Sequence[int]) -> Sequence[int]:
        self.calls.append(list(items))
        await self.may_end.wait()
        return [10 * item for item in items]


def made(service: Service, *, more: bool, max_items: int = 32, max_calls: int = 2) -> Coalescer[int, int]:
    return Coalescer(
        service.call,
        what="a service",
        backoff=Backoff(),
        waits=Waits(),
        more_to_come=lambda: more,
        max_items=max_items,
        max_calls=max_calls,
    )


async def settle() -> None:
    """Lets everything run that waits for nothing."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def _no_window_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalesce, "GATHER_SECONDS", 3600.0)


async def test_items_are_gathered_while_there_is_more_to_come_and_go_together_when_hurried() -> None:
    service = Service()
    coalescer = made(service, more=True)
    answers = [asyncio.create_task(coalescer.submit(item)) for item in (1, 2, 3)]
    await settle()
    assert not service.calls
    coalescer.hurry()
    async with asyncio.timeout(60):
        assert await asyncio.gather(*answers) == [10, 20, 30]
    assert service.calls == [[1, 2, 3]]


async def test_nothing_waits_for_long_when_nothing_is_to_come() -> None:
    service = Service()
    async with asyncio.timeout(60):
        assert await made(service, more=False).submit(1) == 10


async def test_a_full_call_goes_at_once() -> None:
    service = Service()
    coalescer = made(service, more=True, max_items=2)
    async with asyncio.timeout(60):
        assert await asyncio.gather(coalescer.submit(1), coalescer.submit(2)) == [10, 20]
    assert service.calls == [[1, 2]]


async def test_what_had_to_wait_for_a_call_goes_when_it_ends_with_what_came_meanwhile() -> None:
    service = Service()
    service.may_end.clear()
    coalescer = made(service, more=True, max_items=2, max_calls=1)
    answers = [asyncio.create_task(coalescer.submit(item)) for item in (1, 2, 3)]
    await settle()
    assert service.calls == [[1, 2]]
    coalescer.hurry()
    async with asyncio.timeout(60):
        while not coalescer._is_due:
            await asyncio.sleep(0.001)
    answers.append(asyncio.create_task(coalescer.submit(4)))
    service.may_end.set()
    async with asyncio.timeout(60):
        assert await asyncio.gather(*answers) == [10, 20, 30, 40]
    assert service.calls == [[1, 2], [3, 4]]
