"""Finds the scorer, gathers the outcomes of items, and runs scoring streams.

Invariants:

- a response has exactly one outcome an item; what is wrong with one item concerns no other;
- a stream holds at most `MAX_STREAM_ITEMS` items at a time: beyond that it is not read, and flow control holds the
  sender back; a full queue does the same, it never breaks a stream;
- a caller who goes away takes its waiting items along;
- a name is resolved when items are submitted, with nothing awaited in between: what it leads to then scores them, and
  is named in their outcomes, wherever the name leads by the time they are done.
"""

import asyncio
import functools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from steersman.reward.ensemble import EnsembleScorer
from steersman.reward.types import (
    ItemScore,
    Score,
    ScoreItem,
    ScoreOptions,
    Scorer,
    ScorerInfo,
)
from steersman.wire.errors import Reason, SteersmanError, invalid_field, not_found
from steersman.wire.limits import MAX_BATCH_ITEMS

logger = logging.getLogger(__name__)

# Items of one stream that may be waiting at once; enough to keep several batches ahead of the model.
MAX_STREAM_ITEMS = 4 * MAX_BATCH_ITEMS


@dataclass(frozen=True, kw_only=True)
class StreamPart:
    """One message of a stream. `options` is None where those before still hold."""

    items: Sequence[ScoreItem]
    options: ScoreOptions | None = None


class RewardHandler:
    """All scorers of a server by name, one of which is the default."""

    def __init__(
        self, scorers: Mapping[str, Scorer], default: str, *, watched: Callable[[], Iterable[Scorer]] | None = None
    ) -> None:
        """`scorers` may change while it serves. The server is healthy while those that `watched` gives are."""
        if default not in scorers:
            raise ValueError(f"default is {default!r}, allowed: {', '.join(scorers)}")
        self._scorers = scorers
        self._default = default
        self._watched = watched or scorers.values

    async def score(self, items: Sequence[ScoreItem], options: ScoreOptions) -> list[ItemScore]:
        """One outcome an item, in order.

        Raises `SteersmanError` for the whole call: INVALID_FIELD (no items), REQUEST_TOO_LARGE, NOT_FOUND,
        QUEUE_FULL, ENGINE_UNAVAILABLE.
        """
        found = self._find(options)
        _check_number(items, at_least=1)
        futures = await found.scorer.submit(items, options)
        # Cancelling gather cancels the futures, which withdraws the items.
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        return [found.item_score(item, options, outcome) for item, outcome in zip(items, outcomes, strict=True)]

    async def stream(self, parts: AsyncIterator[StreamPart]) -> AsyncGenerator[list[ItemScore], None]:
        """Outcomes as they are ready, in any order; ends when `parts` has ended and all are out.

        Raises what `score` raises except QUEUE_FULL, and INVALID_FIELD for an empty id or one that is in use.
        """
        stream = _Stream(self._find, parts)
        try:
            while (ready := await stream.next_ready()) is not None:
                if ready:
                    yield ready
        finally:
            await stream.close()

    def scorers(self) -> list[ScorerInfo]:
        """All scorers, ascending by name."""
        return [
            ScorerInfo(
                name=name,
                kind=scorer.kind,
                model=scorer.model,
                members=scorer.members if isinstance(scorer, EnsembleScorer) else (),
                is_default=name == self._default,
            )
            for name, scorer in sorted(self._scorers.items())
        ]

    async def check_health(self) -> None:
        """Raises when a scorer cannot score."""
        for scorer in list(self._watched()):
            await scorer.check_health()

    async def close(self) -> None:
        """Fails what waits and frees the models."""
        await asyncio.gather(*(scorer.close() for scorer in self._scorers.values()))

    def _find(self, options: ScoreOptions) -> "_Found":
        name = options.scorer or self._default
        scorer = self._scorers.get(name)
        if scorer is None:
            raise not_found("scorer", name, list(self._scorers))
        return _Found(name, scorer)


@dataclass(frozen=True, slots=True)
class _Found:
    """What a name led to."""

    name: str
    scorer: Scorer

    def item_score(self, item: ScoreItem, options: ScoreOptions, outcome: Score | BaseException) -> ItemScore:
        if isinstance(outcome, BaseException) and not isinstance(outcome, SteersmanError):
            logger.error("scorer %s failed unexpectedly", self.name, exc_info=outcome)
            outcome = SteersmanError(Reason.INTERNAL, f"scorer {self.name} failed; the server's log says why")
        model = self.scorer.model
        return ItemScore(
            id=item.id,
            outcome=outcome,
            scorer=self.name,
            model=self.scorer.name if model is not None else "",
            revision=model.revision if model is not None else "",
            include_raw=options.include_raw,
        )


class _Stream:
    """One scoring stream: a task reads parts and submits them, finished items go to a queue that the caller reads."""

    def __init__(self, find: Callable[[ScoreOptions], _Found], parts: AsyncIterator[StreamPart]) -> None:
        self._find = find
        self._parts = parts
        self._running: dict[str, asyncio.Future[Score]] = {}
        self._ids: set[str] = set()
        self._ready: asyncio.Queue[ItemScore | None] = asyncio.Queue()
        self._progress = asyncio.Event()
        self._reader = asyncio.create_task(self._read())
        self._reader.add_done_callback(lambda _: self._ready.put_nowait(None))

    async def next_ready(self) -> list[ItemScore] | None:
        """Whatever is ready, at times nothing; None at the end. Raises what a bad part or half a stream raised."""
        if self._reader.done():
            self._reader.result()
            if not self._ids:
                return None
        ready = [await self._ready.get()]
        while not self._ready.empty():
            ready.append(self._ready.get_nowait())
        scores = [score for score in ready if score is not None]
        self._ids.difference_update(score.id for score in scores)
        self._progress.set()
        return scores

    async def close(self) -> None:
        """Withdraws what has not been scored."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        for future in self._running.values():
            future.cancel()

    async def _read(self) -> None:
        options = ScoreOptions()
        async for part in self._parts:
            options = part.options or options
            self._find(options)
            _check_number(part.items, at_least=0)
            if part.items:
                self._claim_ids(part.items)
                await self._wait_for_room(len(part.items))
                await self._submit(part.items, options)

    def _claim_ids(self, items: Sequence[ScoreItem]) -> None:
        for index, item in enumerate(items):
            if not item.id or item.id in self._ids:
                raise invalid_field(f"items[{index}].id", item.id, "an id that no other item of the stream has now")
            self._ids.add(item.id)

    async def _wait_for_room(self, num_items: int) -> None:
        """The items are counted already; waits for others to be taken by the caller."""
        while len(self._ids) > max(MAX_STREAM_ITEMS, num_items):
            self._progress.clear()
            await self._progress.wait()

    async def _submit(self, items: Sequence[ScoreItem], options: ScoreOptions) -> None:
        while True:
            found = self._find(options)
            try:
                futures = await found.scorer.submit(items, options)
                break
            except SteersmanError as error:
                if error.reason is not Reason.QUEUE_FULL:
                    raise
                await asyncio.sleep(error.retry_after_seconds or 0.1)
        for item, future in zip(items, futures, strict=True):
            self._running[item.id] = future
            future.add_done_callback(functools.partial(self._finish, item, found, options))

    def _finish(self, item: ScoreItem, found: _Found, options: ScoreOptions, future: "asyncio.Future[Score]") -> None:
        self._running.pop(item.id, None)
        if not future.cancelled():
            self._ready.put_nowait(found.item_score(item, options, future.exception() or future.result()))


def _check_number(items: Sequence[ScoreItem], *, at_least: int) -> None:
    allowed = f"{at_least} to {MAX_BATCH_ITEMS} items"
    if len(items) < at_least:
        raise invalid_field("items", "no items", allowed)
    if len(items) > MAX_BATCH_ITEMS:
        raise invalid_field("items", f"{len(items)} items", allowed, reason=Reason.REQUEST_TOO_LARGE)
