"""Scores by content: what a model has scored before is not computed again, and what it is computing is not begun twice.

It belongs to one loaded model, so that a revision is part of every key, and what is remembered ends with the model. The
key of an item is a SHA-256 over its exact token ids, after truncation; what is stored is the raw score, which depends
on nothing else. Normalisation and penalties are applied to it for each item anew.

Invariants:

- at most `max_items` scores are kept, those least recently used go first; errors are never kept;
- identical items that wait at the same time are one item of the model, which is withdrawn only when all of them are;
- each of them keeps its own deadline, and an interactive one does not wait for one of lower priority.
"""

import asyncio
import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter

from steersman.reward.types import Score, settle
from steersman.serving.batching import Priority, fail_after
from steersman.serving.metrics import Metrics

_ANSWERS: Final = ("hit", "joined", "miss")

Start = Callable[[list[int]], "list[asyncio.Future[Score]]"]


class CacheObserver(Protocol):
    """Told how each item was answered."""

    def answered(self, how: str) -> None:
        """`how` is "hit" (remembered), "joined" (being computed already) or "miss"."""
        ...


class CacheMetrics:
    """The instruments of all caches of a server; `observer` gives the cache of one model its label."""

    def __init__(self, metrics: Metrics) -> None:
        self._items = metrics.counter(
            "score_cache_items", "Items of cached models, by how they were answered.", ("model", "how")
        )

    def observer(self, model: str) -> CacheObserver:
        """What to give to the cache of the model of that name."""
        for how in _ANSWERS:
            self._items.labels(model, how)
        return _Labelled(self._items, model)

    def forget(self, model: str) -> None:
        """Drops the figures of a model that is gone."""
        for how in _ANSWERS:
            self._items.remove(model, how)


@dataclass(frozen=True)
class _Labelled:
    items: Counter
    model: str

    def answered(self, how: str) -> None:
        self.items.labels(self.model, how).inc()


@dataclass(slots=True, eq=False)
class _Flight:
    """An item that the model has, for one or more callers."""

    future: "asyncio.Future[Score]"
    priority: Priority
    num_waiting: int = 0


class ScoreCache:
    """The cache of one model. Used on the event loop only."""

    def __init__(self, max_items: int, observer: CacheObserver | None = None) -> None:
        self._max_items = max_items
        self._observer = observer
        self._raw: OrderedDict[bytes, float] = OrderedDict()
        self._flights: dict[bytes, _Flight] = {}

    def __len__(self) -> int:
        return len(self._raw)

    def submit(
        self,
        rows: Sequence[NDArray[np.int32]],
        *,
        priority: Priority,
        timeouts_s: Sequence[float | None],
        start: Start,
        score: Callable[[int, float], Score],
    ) -> "list[asyncio.Future[Score]]":
        """A future for each row of token ids.

        `start` is called at most once, with the indices of the rows that the model has to run, and returns a future for
        each; what it raises, it raises here, and nothing has happened then. `score` makes the score of a row from a raw
        one.
        """
        keys = [hashlib.sha256(row.tobytes()).digest() for row in rows]
        flights: dict[bytes, _Flight] = {}
        first: dict[bytes, int] = {}
        answers: list[str] = []
        for index, key in enumerate(keys):
            flight = self._flights.get(key)
            if key in self._raw:
                answers.append("hit")
            elif (flight is not None and flight.priority <= priority) or key in first:
                answers.append("joined")
                if key not in first and flight is not None:
                    flights[key] = flight
            else:
                answers.append("miss")
                first[key] = index
        if first:
            for key, started in zip(first, start(list(first.values())), strict=True):
                flight = flights[key] = self._flights[key] = _Flight(started, priority)
                started.add_done_callback(functools.partial(self._landed, key, flight))
        futures = []
        for index, (key, answer, timeout_s) in enumerate(zip(keys, answers, timeouts_s, strict=True)):
            future: asyncio.Future[Score] = asyncio.get_running_loop().create_future()
            if answer == "hit":
                self._raw.move_to_end(key)
                future.set_result(score(index, self._raw[key]))
            else:
                self._join(key, flights[key], future, index, score)
                if timeout_s is not None:
                    fail_after(future, timeout_s)
            futures.append(future)
            if self._observer is not None:
                self._observer.answered(answer)
        return futures

    def _join(
        self,
        key: bytes,
        flight: _Flight,
        future: "asyncio.Future[Score]",
        index: int,
        score: Callable[[int, float], Score],
    ) -> None:
        flight.num_waiting += 1

        def landed(source: "asyncio.Future[Score]") -> None:
            if source.cancelled():
                future.cancel()
                return
            error = source.exception()
            if error is not None:
                settle(future, error)
            elif not future.done():
                raw = source.result().raw
                assert raw is not None
                settle(future, score(index, raw))

        def left(_: object) -> None:
            flight.num_waiting -= 1
            if flight.num_waiting == 0 and not flight.future.done():
                # At once, so that nobody joins an item that is being withdrawn.
                self._leave(key, flight)
                flight.future.cancel()

        flight.future.add_done_callback(landed)
        future.add_done_callback(left)

    def _landed(self, key: bytes, flight: _Flight, _: object) -> None:
        self._leave(key, flight)
        if flight.future.cancelled() or flight.future.exception() is not None:
            return
        raw = flight.future.result().raw
        assert raw is not None
        self._raw[key] = raw
        while len(self._raw) > self._max_items:
            self._raw.popitem(last=False)

    def _leave(self, key: bytes, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
