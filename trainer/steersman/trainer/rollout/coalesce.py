"""Single items into calls.

Completions end one by one, but a scoring service works best on batches: a call of one costs several times the processor
time a token. So a coalescer gathers what comes within a window before it calls, for as long as more is to come.

Invariants: every submitted item gets exactly one answer (a result or an error); items of a call that failed
as a whole are sent again, and one bad item does not spoil the answers of the others.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from steersman.trainer.retry import Backoff, Sleep, Waits, retry
from steersman.wire.errors import Code, SteersmanError

# Beside the time of a response it is nothing, and a model of a few million parameters ends several responses in it.
GATHER_SECONDS: Final = 0.1
# Completions of one decode step arrive within milliseconds of each other.
LAST_GATHER_SECONDS: Final = 0.005

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(kw_only=True)
class _Entry(Generic[Item, Result]):
    item: Item
    answer: "asyncio.Future[Result]"
    num_failures: int = 0


class Coalescer(Generic[Item, Result]):
    """Makes calls of at most `max_items`, at most `max_calls` at once, out of single items.

    A first item waits `GATHER_SECONDS` for company while `more_to_come()` says that there will be more, else
    `LAST_GATHER_SECONDS`; call `hurry` when that changes. An item that fails by itself is tried `item_attempts` times.
    """

    def __init__(
        self,
        call: Callable[[Sequence[Item]], Awaitable[Sequence[Result | SteersmanError]]],
        *,
        what: str,
        backoff: Backoff,
        waits: Waits,
        more_to_come: Callable[[], bool] = lambda: False,
        max_items: int = 32,
        max_calls: int = 2,
        item_attempts: int = 3,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._call = call
        self._what = what
        self._backoff = backoff
        self._waits = waits
        self._max_items = max_items
        self._max_calls = max_calls
        self._more_to_come = more_to_come
        self._item_attempts = item_attempts
        self._sleep = sleep
        self._queue: deque[_Entry[Item, Result]] = deque()
        self._calls: set[asyncio.Task[None]] = set()
        # At most one of them: items wait for others, or have waited long enough and go as soon as a call may begin.
        self._timer: asyncio.TimerHandle | None = None
        self._is_due = False

    async def submit(self, item: Item) -> Result:
        """The result for `item`. Raises its SteersmanError if it failed for good, GaveUp if the service
        stayed away.
        """
        entry: _Entry[Item, Result] = _Entry(item=item, answer=asyncio.get_running_loop().create_future())
        self._enqueue(entry)
        return await entry.answer

    def hurry(self) -> None:
        """No more is to come: what has been gathered goes soon."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(LAST_GATHER_SECONDS, self._pump)

    async def close(self) -> None:
        """Ends calls under way; those who wait for them are cancelled."""
        self._stop_timer()
        for task in self._calls:
            task.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        while self._queue:
            self._queue.popleft().answer.cancel()

    def _enqueue(self, entry: _Entry[Item, Result]) -> None:
        self._queue.append(entry)
        if self._is_due or len(self._queue) >= self._max_items:
            self._pump()
        elif self._timer is None:
            seconds = GATHER_SECONDS if self._more_to_come() else LAST_GATHER_SECONDS
            self._timer = asyncio.get_running_loop().call_later(seconds, self._pump)

    def _pump(self) -> None:
        self._stop_timer()
        while self._queue and len(self._calls) < self._max_calls:
            entries = [self._queue.popleft() for _ in range(min(self._max_items, len(self._queue)))]
            # Whoever was cancelled no longer wants an answer.
            if entries := [entry for entry in entries if not entry.answer.done()]:
                task = asyncio.get_running_loop().create_task(self._run(entries))
                self._calls.add(task)
                task.add_done_callback(self._on_call_done)
        self._is_due = bool(self._queue)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_call_done(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        if self._is_due and not task.cancelled():
            self._pump()

    async def _run(self, entries: list[_Entry[Item, Result]]) -> None:
        try:
            results = await self._answers(entries)
            again: list[_Entry[Item, Result]] = []
            for entry, result in zip(entries, results, strict=True):
                if not isinstance(result, SteersmanError):
                    if not entry.answer.done():
                        entry.answer.set_result(result)
                elif result.code != Code.INVALID_ARGUMENT and entry.num_failures + 1 < self._item_attempts:
                    entry.num_failures += 1
                    again.append(entry)
                else:
                    _fail(entry, result)
            if again:
                await self._sleep(self._backoff.delay(again[0].num_failures))
                for entry in again:
                    self._enqueue(entry)
        except asyncio.CancelledError:
            for entry in entries:
                entry.answer.cancel()
            raise
        except Exception as error:  # given up, or a defect: whoever waits must hear of it
            for entry in entries:
                _fail(entry, error)

    async def _answers(self, entries: list[_Entry[Item, Result]]) -> Sequence[Result | SteersmanError]:
        items = [entry.item for entry in entries]
        try:
            results = await retry(
                lambda: self._call(items),
                what=self._what,
                backoff=self._backoff,
                waits=self._waits,
                sleep=self._sleep,
            )
        except SteersmanError as error:
            if len(entries) == 1:
                entries[0].num_failures = self._item_attempts  # refused for what it is: another try is no use
                return [error]
            # One bad item fails a call that is all or nothing: halve until it stands alone.
            middle = len(entries) // 2
            return [*await self._answers(entries[:middle]), *await self._answers(entries[middle:])]
        if len(results) != len(items):
            raise RuntimeError(f"{self._what} answered {len(results)} of {len(items)} items")
        return results


def _fail(entry: _Entry[Item, Result], error: Exception) -> None:
    if not entry.answer.done():
        entry.answer.set_exception(error)
