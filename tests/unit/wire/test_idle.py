"""What is kept after its use, and what is not."""

import asyncio

import pytest

from steersman.wire.idle import IdlePool


class Thing:
    def __init__(self, name: str) -> None:
        self.name = name
        self.closed = asyncio.Event()

    async def close(self) -> None:
        self.closed.set()


class Shop:
    def __init__(self, idle_seconds: float = 3600.0) -> None:
        self.made: list[Thing] = []
        self.pool: IdlePool[Thing] = IdlePool(self._make, lambda thing: thing.close(), idle_seconds=idle_seconds)

    def _make(self, key: str) -> Thing:
        self.made.append(Thing(key))
        return self.made[-1]


async def test_one_is_opened_for_each_key_and_used_again() -> None:
    shop = Shop()
    async with shop.pool.lease("a") as first, shop.pool.lease("a") as same, shop.pool.lease("b") as other:
        assert first is same
        assert first is not other
    async with shop.pool.lease("a") as again:
        assert again is first
    assert [thing.name for thing in shop.made] == ["a", "b"]
    await shop.pool.close()
    assert all(thing.closed.is_set() for thing in shop.made)
    assert len(shop.pool) == 0


async def test_what_nobody_uses_is_closed_after_a_while() -> None:
    shop = Shop(idle_seconds=0.01)
    async with shop.pool.lease("a") as thing:
        pass
    async with asyncio.timeout(60):
        await thing.closed.wait()
    async with shop.pool.lease("a") as other:
        assert other is not thing
        assert not other.closed.is_set()
    await shop.pool.close()


async def test_what_an_error_was_met_with_is_not_given_again() -> None:
    shop = Shop()
    async with shop.pool.lease("a") as thing:
        with pytest.raises(RuntimeError):
            async with shop.pool.lease("a"):
                raise RuntimeError
        assert not thing.closed.is_set()
        async with shop.pool.lease("a") as other:
            assert other is not thing
    async with asyncio.timeout(60):
        await thing.closed.wait()
    assert not other.closed.is_set()
    await shop.pool.close()
