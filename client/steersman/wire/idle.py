"""Connections that are kept for a while after their use."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(kw_only=True, eq=False)
class _Entry(Generic[T]):
    thing: T
    num_users: int = 0
    is_kept: bool = True
    timer: asyncio.TimerHandle | None = None


class IdlePool(Generic[T]):
    """One of something for each key: opened when it is first asked for, shared by all who use it at once, closed when
    nobody has used it for `idle_seconds`. What somebody met an error with is closed after its last use, and whoever
    comes meanwhile gets a new one. Lives on one event loop; `close` it.
    """

    def __init__(self, open_: Callable[[str], T], close: Callable[[T], Awaitable[Any]], *, idle_seconds: float) -> None:
        self._open, self._close = open_, close
        self._idle_seconds = idle_seconds
        self._entries: dict[str, _Entry[T]] = {}
        self._closing: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        """How many are open and may be asked for again."""
        return len(self._entries)

    @asynccontextmanager
    async def lease(self, key: str) -> AsyncIterator[T]:
        """The one for `key`."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(thing=self._open(key))
        if entry.timer is not None:
            entry.timer.cancel()
            entry.timer = None
        entry.num_users += 1
        try:
            yield entry.thing
        except BaseException:
            self._forget(key, entry)
            raise
        finally:
            entry.num_users -= 1
            if entry.num_users == 0:
                if entry.is_kept:
                    loop = asyncio.get_running_loop()
                    entry.timer = loop.call_later(self._idle_seconds, self._expire, key, entry)
                else:
                    self._end(entry)

    async def close(self) -> None:
        """Closes what nobody uses; what is in use is closed after that."""
        for key, entry in list(self._entries.items()):
            if entry.num_users:
                self._forget(key, entry)
            else:
                self._expire(key, entry)
        if self._closing:
            await asyncio.wait(self._closing)

    def _expire(self, key: str, entry: _Entry[T]) -> None:
        self._forget(key, entry)
        self._end(entry)

    def _forget(self, key: str, entry: _Entry[T]) -> None:
        entry.is_kept = False
        if self._entries.get(key) is entry:
            del self._entries[key]

    def _end(self, entry: _Entry[T]) -> None:
        if entry.timer is not None:
            entry.timer.cancel()
        task = asyncio.ensure_future(self._close(entry.thing))
        self._closing.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._closing.discard(task)
        if not task.cancelled():
            task.exception()  # nobody can use it any more, whatever that says
