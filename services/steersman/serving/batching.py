"""Dynamic batching across callers: an asyncio front, and worker threads that run the batches, one by default.

Invariants:

- every admitted item ends exactly once: with a result, an error, or its own cancellation;
- an item whose caller is gone (cancelled, past its deadline) before its batch starts is never run;
- a batch never computes more tokens (padding counted, common beginnings counted once where the model computes them
  once) than the budget, unless it holds one item only;
- an item fails alone: a batch that raises is run again in halves until the bad items are by themselves;
- no starvation: a lane is served in waves of a bounded number of tokens, a wave is a first-come prefix of the lane,
  and an item that arrives later never enters a wave before those in front of it. Bulk gets at least one batch after
  every `INTERACTIVE_STREAK` interactive ones.

A worker takes its work itself, so it never waits for the event loop between two batches. While all are busy, items
collect, and join those of the wave that are not run yet until it has had as many as it may. Only when it was idle may
a worker wait for callers to join, `max_delay_ms` for each one that does, and only for as many as came together last
time: a lone caller is never held back. Several workers share a wave evenly, so that they come to its end together.
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

from steersman.serving.arrangement import Arrangement, ByLength, worth_padding
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

# An idle worker waits at most so often `max_delay_ms` for callers that keep on joining.
_MAX_DELAYS: Final = 10

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
    """Items of one priority: those waiting in order of arrival, and the batches of the present wave, next one last."""

    queue: "deque[_Entry[ItemT, ResultT]]" = field(default_factory=deque)
    wave: "list[list[_Entry[ItemT, ResultT]]]" = field(default_factory=list)
    num_wave_tokens: int = 0

    def __len__(self) -> int:
        return len(self.queue) + sum(map(len, self.wave))

    @property
    def num_tokens(self) -> int:
        """Of all its items."""
        return sum(entry.num_tokens for entries in (self.queue, *self.wave) for entry in entries)

    def purge(self) -> None:
        """Forgets items whose caller is gone."""
        self.queue = deque(entry for entry in self.queue if not entry.future.done())
        self.wave = [_present(batch) for batch in self.wave]

    def refill(
        self, arrangement: Arrangement[ItemT], settings: BatchingSettings, num_workers: int, max_tokens: int
    ) -> None:
        """Adds a prefix of the queue to the wave until it has had `max_tokens`; starts the next one if it is over."""
        if not self.wave:
            self.num_wave_tokens = 0
        joining = []
        while self.queue and self.num_wave_tokens < max_tokens:
            entry = self.queue.popleft()
            if not entry.future.done():
                self.num_wave_tokens += entry.num_tokens
                joining.append(entry)
        if joining:
            taken = _present([entry for batch in self.wave for entry in batch]) + joining
            plan = arrangement.plan(
                [entry.item for entry in taken], [entry.num_tokens for entry in taken], settings, num_workers
            )
            self.wave = [[taken[index] for index in batch] for batch in reversed(plan)]

    def take(self) -> "list[_Entry[ItemT, ResultT]]":
        """The next batch of the wave, without abandoned items; empty if nothing is left of the wave."""
        while self.wave:
            if batch := _present(self.wave.pop()):
                return batch
        return []


def _present(entries: "Sequence[_Entry[ItemT, ResultT]]") -> "list[_Entry[ItemT, ResultT]]":
    return [entry for entry in entries if not entry.future.done()]


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
    """Collects items from many callers and runs them in batches on threads of its own.

    Create it on the event loop whose callers it serves. `run` gets the items of a batch, in the order of the
    arrangement (longest first, unless told otherwise), and returns one result an item in the same order; a result that
    is an exception fails its item. It is only ever called on the worker threads, `num_workers` calls at a time.
    """

    def __init__(
        self,
        run: Callable[[Sequence[ItemT]], Sequence[ResultT | Exception]],
        settings: BatchingSettings,
        *,
        name: str,
        observer: BatchObserver | None = None,
        arrangement: Arrangement[ItemT] | None = None,
        num_workers: int = 1,
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
        self._first_queued_at = self._last_queued_at = 0.0
        self._closed = False
        # Written by the workers, read by anyone:
        self._busy_since: list[float | None] = [None] * num_workers
        self._tokens_per_s: float | None = None
        self._computed_per_s: float | None = None
        self.num_failures_in_a_row = 0
        self._threads = [
            threading.Thread(target=self._work, args=(index,), name=f"batcher-{name}", daemon=True)
            for index in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

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
            if self._closed or not self._is_alive():
                raise unavailable(f"{self.name} is shutting down")
            self._make_room(len(entries))
            if not self._num_waiting():
                self._first_queued_at = now
            self._last_queued_at = now
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
        """Raises ENGINE_UNAVAILABLE if a worker is gone, or has been at one batch for more than `stall_s`."""
        if not self._is_alive():
            raise unavailable(f"the worker of {self.name} has ended")
        now = time.monotonic()
        if any(since is not None and now - since > stall_s for since in list(self._busy_since)):
            raise unavailable(f"the worker of {self.name} has been at one batch for more than {stall_s:g} s")

    async def close(self, timeout_s: float = 30.0) -> None:
        """Refuses new items, fails those that wait, and lets the running batch end (for at most `timeout_s`)."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            await asyncio.to_thread(thread.join, max(0.0, end - time.monotonic()))

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
        queued = sum(lane.num_tokens for lane in self._lanes.values())
        return min(60.0, max(0.01, queued / 2 / (self._tokens_per_s * len(self._threads))))

    @staticmethod
    def _deliver(entries: "Sequence[_Entry[ItemT, ResultT]]", outcomes: Sequence[ResultT | Exception]) -> None:
        for entry, outcome in zip(entries, outcomes, strict=True):
            if entry.future.done():
                continue
            if isinstance(outcome, Exception):
                entry.future.set_exception(outcome)
            else:
                entry.future.set_result(outcome)

    # --- the worker threads ---

    def _is_alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def _work(self, index: int) -> None:
        # The kernel's name of the thread, which those that OpenMP starts for it inherit: `top -H` tells them apart.
        with contextlib.suppress(OSError):
            Path("/proc/thread-self/comm").write_text(f"batcher-{self.name}"[:15])
        try:
            while batch := self._next_batch():
                self._execute(batch, index)
        finally:
            self._fail_the_rest()

    def _next_batch(self) -> "list[_Entry[ItemT, ResultT]]":
        """Waits for items and takes a batch; an empty one when closed."""
        batch: list[_Entry[ItemT, ResultT]] = []
        num_workers = len(self._threads)
        with self._condition:
            while not batch and self._wait_for_items():
                lane = self._choose_lane()
                settings = self._settings.at_speed(self._computed_per_s)
                max_tokens = WAVE_BATCHES * num_workers * settings.batch_tokens
                before = self._calls_expected if lane.wave else 0
                lane.refill(self._arrangement, settings, num_workers, max_tokens)
                self._calls_expected, self._calls_waiting = max(1, before + self._calls_waiting), 0
                batch = lane.take()
            waiting = self._num_waiting()
            if waiting:
                # There is work for another one, who may not have been told.
                self._condition.notify()
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
            delay_s = self._settings.max_delay_ms / 1000
            end = min(self._first_queued_at + _MAX_DELAYS * delay_s, self._last_queued_at + delay_s)
            left_s = end - time.monotonic()
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

    def _execute(self, entries: "list[_Entry[ItemT, ResultT]]", index: int) -> None:
        started = self._busy_since[index] = time.monotonic()
        outcomes = self._run_isolated(entries)
        run_s = time.monotonic() - started
        self._busy_since[index] = None
        num_tokens = sum(entry.num_tokens for entry in entries)
        tally = self._arrangement.count([entry.item for entry in entries], [entry.num_tokens for entry in entries])
        num_computed = num_tokens + tally.num_padding_tokens - tally.num_shared_tokens
        self._tokens_per_s = _smooth(self._tokens_per_s, num_tokens / max(run_s, 1e-6))
        self._computed_per_s = _smooth(self._computed_per_s, num_computed / max(run_s, 1e-6))
        if self._observer is not None:
            record = BatchRecord(
                num_items=len(entries),
                num_tokens=num_tokens,
                num_padding_tokens=tally.num_padding_tokens,
                num_shared_tokens=tally.num_shared_tokens,
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
            self._condition.notify_all()
            rest = [entry for lane in self._lanes.values() for entries in (lane.queue, *lane.wave) for entry in entries]
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
