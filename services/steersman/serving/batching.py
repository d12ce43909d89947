"""Dynamic batching across callers: an asyncio front, and one worker thread that runs the batches.

Invariants:

- every admitted item ends exactly once: with a result, an error, or its own cancellation;
- an item whose caller is gone (cancelled, past its deadline) before it was cut into a batch is never run;
- a batch never computes more tokens (padding counted, common beginnings counted once where the model computes them
  once) than the budget, unless it holds one item only;
- an item fails alone: a batch that raises is run again in halves until the bad items are by themselves;
- no starvation: a lane is served in waves, a wave is a first-come prefix of the lane, and an item that arrives
  later never enters a wave before those in front of it. Bulk gets at least one batch after every
  `INTERACTIVE_STREAK` interactive ones.

The worker takes its work itself, so it never waits for the event loop between two batches. While it is busy, items
collect, and the next wave takes all of them. Only when it was idle may it wait `max_delay_ms` for callers to join,
and only for as many as came together last time: a lone caller is never held back.
"""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Final, Generic, TypeVar

from steersman.serving.arrangement import Arrangement, ByLength, Cut, worth_padding
from steersman.serving.batch_metrics import BatchObserver, BatchRecord
from steersman.serving.batch_settings import BatchingSettings
from steersman.wire.errors import Reason, SteersmanError, queue_full, unavailable

__all__ = ["Batcher", "BatchingSettings", "Priority", "fail_after", "worth_padding"]

_log = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

# Interactive batches in a row after which waiting bulk items get one.
INTERACTIVE_STREAK: Final = 4

# A wave is what is sorted at once. Longer waves pad less but let an item be overtaken by more later ones.
WAVE_BATCHES: Final = 16

# Told to a caller who meets a full queue before any batch has been timed.
_FIRST_RETRY_AFTER_S: Final = 0.5


class Priority(IntEnum):
    """Which items go first."""

    INTERACTIVE = 0
    BULK = 1


@dataclass(slots=True, eq=False)
class _Entry(Generic[ItemT, ResultT]):
    item: ItemT
    num_tokens: int
    future: "asyncio.Future[ResultT]"
    queued_at: float


@dataclass(slots=True)
class _Lane(Generic[ItemT, ResultT]):
    """Items of one priority: those waiting in order of arrival, and the present wave, what runs next at the end."""

    queue: "deque[_Entry[ItemT, ResultT]]" = field(default_factory=deque)
    wave: "list[_Entry[ItemT, ResultT]]" = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.queue) + len(self.wave)

    def purge(self) -> None:
        """Forgets items whose caller is gone."""
        self.queue = deque(entry for entry in self.queue if not entry.future.done())
        self.wave = [entry for entry in self.wave if not entry.future.done()]

    def refill(self, arrangement: Arrangement[ItemT], max_tokens: int) -> None:
        """Starts the next wave with a prefix of the queue."""
        taken, num_tokens = [], 0
        while self.queue and num_tokens < max_tokens:
            entry = self.queue.popleft()
            if not entry.future.done():
                num_tokens += entry.num_tokens
                taken.append(entry)
        order = arrangement.order([entry.item for entry in taken], [entry.num_tokens for entry in taken])
        self.wave = [taken[index] for index in reversed(order)]

    def cut(self, arrangement: Arrangement[ItemT], settings: BatchingSettings) -> "_Batch[ItemT, ResultT]":
        """Takes the next items of the wave, as many as make a good batch. Skips abandoned ones."""
        head: list[_Entry[ItemT, ResultT]] = []
        while self.wave and len(head) < settings.max_batch_items:
            entry = self.wave.pop()
            if not entry.future.done():
                head.append(entry)
        if not head:
            return _Batch()
        cut = arrangement.cut([entry.item for entry in head], [entry.num_tokens for entry in head], settings)
        self.wave.extend(reversed(head[cut.num_items :]))
        return _Batch(head[: cut.num_items], cut)


@dataclass(slots=True)
class _Batch(Generic[ItemT, ResultT]):
    entries: "list[_Entry[ItemT, ResultT]]" = field(default_factory=list)
    cut: Cut = field(default_factory=lambda: Cut(num_items=0))


def fail_after(future: "asyncio.Future[ResultT]", timeout_s: float) -> None:
    """Lets `future` fail with DEADLINE_EXCEEDED if it is not done within `timeout_s`."""

    def expire() -> None:
        if not future.done():
            message = f"not done within the {timeout_s:g} s that were given"
            future.set_exception(SteersmanError(Reason.DEADLINE_EXCEEDED, message))

    timer = future.get_loop().call_later(timeout_s, expire)
    future.add_done_callback(lambda _: timer.cancel())


def _smooth(average: float | None, value: float) -> float:
    return value if average is None else 0.8 * average + 0.2 * value


class Batcher(Generic[ItemT, ResultT]):
    """Collects items from many callers and runs them in batches on a thread of its own.

    Create it on the event loop whose callers it serves. `run` gets the items of a batch, in the order of the
    arrangement (longest first, unless told otherwise), and returns one result an item in the same order; a result that
    is an exception fails its item. It is only ever called on the worker thread, one call at a time.
    """

    def __init__(
        self,
        run: Callable[[Sequence[ItemT]], Sequence[ResultT | Exception]],
        settings: BatchingSettings,
        *,
        name: str,
        observer: BatchObserver | None = None,
        arrangement: Arrangement[ItemT] | None = None,
    ) -> None:
        self.name = name
        self._run = run
        self._settings = settings
        self._arrangement: Arrangement[ItemT] = arrangement or ByLength()
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._condition = threading.Condition()
        # Guarded by the condition:
        self._lanes: dict[Priority, _Lane[ItemT, ResultT]] = {priority: _Lane() for priority in Priority}
        self._streak = 0
        self._calls_waiting = 0
        self._calls_expected = 1
        self._first_queued_at = 0.0
        self._closed = False
        # Written by the worker, read by anyone:
        self._busy_since: float | None = None
        self._tokens_per_s: float | None = None
        self._computed_per_s: float | None = None
        self.num_failures_in_a_row = 0
        self._thread = threading.Thread(target=self._work, name=f"batcher-{name}", daemon=True)
        self._thread.start()

    # --- the asyncio side ---

    def submit(
        self,
        items: Sequence[ItemT],
        num_tokens: Sequence[int],
        *,
        priority: Priority = Priority.BULK,
        timeouts_s: Sequence[float | None] | None = None,
    ) -> "list[asyncio.Future[ResultT]]":
        """Admits all items or none, and returns a future for each. Cancelling a future withdraws its item.

        An empty queue admits any number, so that a list longer than the queue cannot be refused for ever.

        Raises `SteersmanError`: QUEUE_FULL with an estimate of when there is room, ENGINE_UNAVAILABLE after `close`.
        A future fails with DEADLINE_EXCEEDED when its timeout passes, or with what `run` raised for it.
        """
        now = time.monotonic()
        entries = [
            _Entry[ItemT, ResultT](item, tokens, self._loop.create_future(), now)
            for item, tokens in zip(items, num_tokens, strict=True)
        ]
        with self._condition:
            if self._closed or not self._thread.is_alive():
                raise unavailable(f"{self.name} is shutting down")
            self._make_room(len(entries))
            if not self._num_waiting():
                self._first_queued_at = now
            self._lanes[priority].queue.extend(entries)
            self._calls_waiting += 1
            waiting = self._num_waiting()
            self._condition.notify()
        if self._observer is not None:
            self._observer.queue_changed(waiting)
        if timeouts_s is not None:
            for entry, timeout_s in zip(entries, timeouts_s, strict=True):
                if timeout_s is not None:
                    fail_after(entry.future, timeout_s)
        return [entry.future for entry in entries]

    async def run(
        self, items: Sequence[ItemT], num_tokens: Sequence[int], *, priority: Priority = Priority.BULK
    ) -> list[ResultT]:
        """All results in order. Raises the first error; the items left are withdrawn then, or when cancelled."""
        futures = self.submit(items, num_tokens, priority=priority)
        try:
            return await asyncio.gather(*futures)
        finally:
            for future in futures:
                future.cancel()

    @property
    def num_waiting(self) -> int:
        """Items that wait to be run."""
        with self._condition:
            return self._num_waiting()

    def check_health(self, stall_s: float = math.inf) -> None:
        """Raises ENGINE_UNAVAILABLE if the worker is gone, or has been at one batch for more than `stall_s`."""
        if not self._thread.is_alive():
            raise unavailable(f"the worker of {self.name} has ended")
        busy_since = self._busy_since
        if busy_since is not None and time.monotonic() - busy_since > stall_s:
            raise unavailable(f"the worker of {self.name} has been at one batch for more than {stall_s:g} s")

    async def close(self, timeout_s: float = 30.0) -> None:
        """Refuses new items, fails those that wait, and lets the running batch end (for at most `timeout_s`)."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        await asyncio.to_thread(self._thread.join, timeout_s)

    def _make_room(self, num_items: int) -> None:
        limit = self._settings.max_queue_items
        if self._num_waiting() + num_items <= limit:
            return
        for lane in self._lanes.values():
            lane.purge()
        waiting = self._num_waiting()
        if waiting and waiting + num_items > limit:
            raise queue_full(f"the queue of {self.name}", limit, self._retry_after_s())

    def _retry_after_s(self) -> float:
        """Time to work off half of what waits."""
        if self._tokens_per_s is None:
            return _FIRST_RETRY_AFTER_S
        queued = sum(
            entry.num_tokens
            for lane in self._lanes.values()
            for entries in (lane.queue, lane.wave)
            for entry in entries
        )
        return min(60.0, max(0.01, queued / 2 / self._tokens_per_s))

    @staticmethod
    def _deliver(entries: "Sequence[_Entry[ItemT, ResultT]]", outcomes: Sequence[ResultT | Exception]) -> None:
        for entry, outcome in zip(entries, outcomes, strict=True):
            if entry.future.done():
                continue
            if isinstance(outcome, Exception):
                entry.future.set_exception(outcome)
            else:
                entry.future.set_result(outcome)

    # --- the worker thread ---

    def _work(self) -> None:
        # The kernel's name of the thread, which those that OpenMP starts for it inherit: `top -H` tells them apart.
        with contextlib.suppress(OSError):
            Path("/proc/thread-self/comm").write_text(f"batcher-{self.name}"[:15])
        try:
            while (batch := self._next_batch()).entries:
                self._execute(batch)
        finally:
            self._fail_the_rest()

    def _next_batch(self) -> "_Batch[ItemT, ResultT]":
        """Waits for items and cuts a batch; an empty one when closed."""
        batch: _Batch[ItemT, ResultT] = _Batch()
        with self._condition:
            while not batch.entries and self._wait_for_items():
                lane = self._choose_lane()
                if not lane.wave:
                    lane.refill(self._arrangement, WAVE_BATCHES * self._settings.batch_tokens)
                    self._calls_expected, self._calls_waiting = max(1, self._calls_waiting), 0
                batch = lane.cut(self._arrangement, self._settings.at_speed(self._computed_per_s))
            waiting = self._num_waiting()
        if self._observer is not None:
            self._observer.queue_changed(waiting)
        return batch

    def _wait_for_items(self) -> bool:
        """Blocks until a batch should start; False when closed. Holds the condition on entry and exit."""
        was_idle = False
        while not self._closed:
            if not self._num_waiting():
                was_idle = True
                self._condition.wait()
                continue
            left_s = self._first_queued_at + self._settings.max_delay_ms / 1000 - time.monotonic()
            if not was_idle or left_s <= 0 or self._is_worth_starting():
                return True
            self._condition.wait(left_s)
        return False

    def _is_worth_starting(self) -> bool:
        """Whether the worker has nothing to gain from waiting for more callers."""
        bulk = self._lanes[Priority.BULK]
        return (
            len(self._lanes[Priority.INTERACTIVE]) > 0
            or self._calls_waiting >= self._calls_expected
            or len(bulk) >= self._settings.max_batch_items
            or sum(entry.num_tokens for entry in bulk.queue) >= self._settings.batch_tokens
        )

    def _choose_lane(self) -> "_Lane[ItemT, ResultT]":
        interactive, bulk = self._lanes[Priority.INTERACTIVE], self._lanes[Priority.BULK]
        if len(interactive) and not (len(bulk) and self._streak >= INTERACTIVE_STREAK):
            self._streak += 1
            return interactive
        self._streak = 0
        return bulk

    def _execute(self, batch: "_Batch[ItemT, ResultT]") -> None:
        entries, cut = batch.entries, batch.cut
        started = self._busy_since = time.monotonic()
        outcomes = self._run_isolated(entries)
        run_s = time.monotonic() - started
        self._busy_since = None
        num_tokens = sum(entry.num_tokens for entry in entries)
        num_computed = num_tokens + cut.num_padding_tokens - cut.num_shared_tokens
        self._tokens_per_s = _smooth(self._tokens_per_s, num_tokens / max(run_s, 1e-6))
        self._computed_per_s = _smooth(self._computed_per_s, num_computed / max(run_s, 1e-6))
        if self._observer is not None:
            record = BatchRecord(
                num_items=len(entries),
                num_tokens=num_tokens,
                num_padding_tokens=cut.num_padding_tokens,
                num_shared_tokens=cut.num_shared_tokens,
                queue_s=started - min(entry.queued_at for entry in entries),
                run_s=run_s,
                num_failed=sum(isinstance(outcome, Exception) for outcome in outcomes),
            )
            self._observer.batch_done(record)
        self._post(entries, outcomes)

    def _run_isolated(self, batch: "list[_Entry[ItemT, ResultT]]") -> "list[ResultT | Exception]":
        """Runs a batch; if it raises, its halves, down to single items, whose errors are their own."""
        try:
            results = self._run([entry.item for entry in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{self.name} returned {len(results)} results for {len(batch)} items")
            self.num_failures_in_a_row = 0
            return list(results)
        except Exception as error:
            self.num_failures_in_a_row += 1
            if len(batch) == 1:
                _log.warning("an item of %s failed", self.name, exc_info=error)
                return [error]
            _log.warning("a batch of %d items of %s failed; trying its halves", len(batch), self.name)
        middle = len(batch) // 2
        return self._run_isolated(batch[:middle]) + self._run_isolated(batch[middle:])

    def _fail_the_rest(self) -> None:
        with self._condition:
            self._closed = True
            rest = [entry for lane in self._lanes.values() for entry in (*lane.queue, *lane.wave)]
            for lane in self._lanes.values():
                lane.queue.clear()
                lane.wave.clear()
        self._post(rest, [unavailable(f"{self.name} is shutting down") for _ in rest])

    def _post(self, entries: "list[_Entry[ItemT, ResultT]]", outcomes: "Sequence[ResultT | Exception]") -> None:
        # A closed loop has nobody left who waits.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, entries, outcomes)

    def _num_waiting(self) -> int:
        return sum(len(lane) for lane in self._lanes.values())
