"""Outcomes of calls and streams, with scorers whose futures the test holds."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Self

import pytest

from steersman.reward.handler import RewardHandler, StreamPart
from steersman.reward.types import ItemScore, Score, ScoreItem, ScoreOptions, ScorerKind, TextContent
from steersman.wire.errors import Reason, SteersmanError, queue_full

WAIT_S = 10


class HeldScorer:
    """Hands its futures to the test; refuses the next `num_refusals` submissions."""

    kind = ScorerKind.FUNCTION
    model = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.futures: dict[str, asyncio.Future[Score]] = {}
        self.options: list[ScoreOptions] = []
        self.submitted = asyncio.Condition()
        self.num_refusals = 0
        self.closed = False

    async def submit(self, items: Sequence[ScoreItem], options: ScoreOptions) -> list[asyncio.Future[Score]]:
        if self.num_refusals:
            self.num_refusals -= 1
            raise queue_full("the queue", 1, 0.001)
        loop = asyncio.get_running_loop()
        made = {item.id: loop.create_future() for item in items}
        self.options.append(options)
        async with self.submitted:
            self.futures |= made
            self.submitted.notify_all()
        return list(made.values())

    async def until(self, *ids: str) -> None:
        async with asyncio.timeout(WAIT_S), self.submitted:
            await self.submitted.wait_for(lambda: set(ids) <= set(self.futures))

    def finish(self, identifier: str, value: float = 0.0) -> None:
        self.futures[identifier].set_result(Score(value=value, raw=2 * value))

    async def check_health(self) -> None:
        return None

    async def close(self) -> None:
        self.closed = True


class Sender:
    """The sending side of a stream, moved by the test."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[StreamPart | None] = asyncio.Queue()

    def send(self, *ids: str, options: ScoreOptions | None = None) -> None:
        self.queue.put_nowait(StreamPart(items=items(*ids), options=options))

    def end(self) -> None:
        self.queue.put_nowait(None)

    async def parts(self) -> AsyncIterator[StreamPart]:
        while (part := await self.queue.get()) is not None:
            yield part


def items(*ids: str) -> list[ScoreItem]:
    return [ScoreItem(id=identifier, content=TextContent(prompt="", response="r")) for identifier in ids]


@pytest.fixture
async def held() -> HeldScorer:
    return HeldScorer("a")


class Receiver:
    """The receiving side: reads all the time, as a gRPC server does, and hands over on demand."""

    def __init__(self, handler: RewardHandler, parts: AsyncIterator[StreamPart]) -> None:
        self._found: asyncio.Queue[list[ItemScore] | Exception] = asyncio.Queue()
        self._task = asyncio.create_task(self._pump(handler, parts))

    async def _pump(self, handler: RewardHandler, parts: AsyncIterator[StreamPart]) -> None:
        try:
            async with aclosing(handler.stream(parts)) as stream:
                async for found in stream:
                    self._found.put_nowait(found)
        except Exception as error:
            self._found.put_nowait(error)
        else:
            self._found.put_nowait([])

    async def batch(self) -> list[ItemScore]:
        """The next batch; an empty one at the end."""
        found = await asyncio.wait_for(self._found.get(), WAIT_S)
        if isinstance(found, Exception):
            raise found
        return found

    async def next(self) -> dict[str, float | Reason | None]:
        """The next batch by id."""
        return {
            item.id: item.outcome.value if isinstance(item.outcome, Score) else item.outcome.reason
            for item in await self.batch()
        }

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def test_unary_outcomes_are_in_order_and_named(held):
    handler = RewardHandler({"a": held}, "a")
    call = asyncio.create_task(handler.score(items("x", "y", "z"), ScoreOptions()))
    await held.until("x", "y", "z")
    held.futures["z"].set_exception(SteersmanError(Reason.NOT_FINITE, "nan"))
    held.futures["y"].set_exception(RuntimeError("a defect with private text"))
    held.finish("x", 1.0)
    x, y, z = await call
    assert (x.id, x.scorer, x.outcome) == ("x", "a", Score(value=1.0, raw=2.0))
    assert isinstance(y.outcome, SteersmanError)
    assert y.outcome.reason is Reason.INTERNAL
    assert "private" not in y.outcome.message
    assert isinstance(z.outcome, SteersmanError)
    assert z.outcome.reason is Reason.NOT_FINITE


async def test_a_cancelled_call_withdraws_its_items(held):
    handler = RewardHandler({"a": held}, "a")
    call = asyncio.create_task(handler.score(items("x"), ScoreOptions()))
    await held.until("x")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert held.futures["x"].cancelled()


async def test_the_scorer_is_chosen_by_name(held):
    other = HeldScorer("b")
    handler = RewardHandler({"b": other, "a": held}, "b")
    call = asyncio.create_task(handler.score(items("x"), ScoreOptions(scorer="a")))
    await held.until("x")
    held.finish("x")
    await call
    assert not other.futures
    assert [(info.name, info.is_default) for info in handler.scorers()] == [("a", False), ("b", True)]
    with pytest.raises(SteersmanError, match="no scorer is called 'c'; known: a, b") as raised:
        await handler.score(items("x"), ScoreOptions(scorer="c"))
    assert raised.value.reason is Reason.NOT_FOUND
    await handler.close()
    assert held.closed
    assert other.closed


@pytest.mark.parametrize(("count", "reason"), [(0, Reason.INVALID_FIELD), (1025, Reason.REQUEST_TOO_LARGE)])
async def test_the_number_of_items_is_bounded(held, count, reason):
    handler = RewardHandler({"a": held}, "a")
    with pytest.raises(SteersmanError) as raised:
        await handler.score(items(*map(str, range(count))), ScoreOptions())
    assert raised.value.reason is reason
    assert raised.value.violations[0].field == "items"


async def test_a_stream_answers_in_the_order_of_completion(held):
    handler, sender = RewardHandler({"a": held}, "a"), Sender()
    async with Receiver(handler, sender.parts()) as stream:
        sender.send("x", "y")
        sender.send("z")
        await held.until("x", "y", "z")
        held.finish("z", 3.0)
        assert await stream.next() == {"z": 3.0}
        held.finish("y", 2.0)
        assert await stream.next() == {"y": 2.0}
        sender.end()
        held.finish("x", 1.0)
        assert await stream.next() == {"x": 1.0}
        assert await stream.next() == {}


async def test_options_of_a_stream_hold_until_they_change(held):
    handler, sender = RewardHandler({"a": held}, "a"), Sender()
    async with Receiver(handler, sender.parts()) as stream:
        raw = ScoreOptions(include_raw=True)
        sender.send("x", options=raw)
        sender.send("y")
        sender.send("z", options=ScoreOptions())
        await held.until("x", "y", "z")
        assert held.options == [raw, raw, ScoreOptions()]
        for identifier in "xyz":
            held.finish(identifier)
        found = await stream.batch()
        assert {item.id: item.include_raw for item in found} == {"x": True, "y": True, "z": False}


async def test_a_full_queue_holds_a_stream_back_but_does_not_break_it(held):
    handler, sender = RewardHandler({"a": held}, "a"), Sender()
    held.num_refusals = 3
    async with Receiver(handler, sender.parts()) as stream:
        sender.send("x")
        await held.until("x")
        held.finish("x", 1.0)
        assert await stream.next() == {"x": 1.0}


async def test_a_stream_is_read_no_further_than_its_bound(held, monkeypatch):
    monkeypatch.setattr("steersman.reward.handler.MAX_STREAM_ITEMS", 2)
    handler, sender = RewardHandler({"a": held}, "a"), Sender()
    async with Receiver(handler, sender.parts()) as stream:
        for identifier in ("v", "w", "x", "y", "z"):
            sender.send(identifier)
        sender.end()
        await held.until("v", "w")
        done = []
        for identifier in ("v", "w", "x", "y", "z"):
            await held.until(identifier)
            assert len(held.futures) <= len(done) + 2
            held.finish(identifier)
            done += list(await stream.next())
        assert done == ["v", "w", "x", "y", "z"]


@pytest.mark.parametrize("bad", [("",), ("x",), ("y", "y")])
async def test_an_id_that_is_empty_or_in_use_ends_the_stream(held, bad):
    handler, sender = RewardHandler({"a": held}, "a"), Sender()
    async with Receiver(handler, sender.parts()) as stream:
        sender.send("x")
        await held.until("x")
        sender.send(*bad)
        with pytest.raises(SteersmanError) as raised:
            await stream.next()
        assert raised.value.violations[0].field == f"items[{len(bad) - 1}].id"
    assert held.futures["x"].cancelled()


async def test_an_id_may_come_again_after_its_score(held):
    handler, sender = RewardHandler({"a": held}, "a"), Sender()
    async with Receiver(handler, sender.parts()) as stream:
        for value in (1.0, 2.0):
            held.futures.clear()
            sender.send("x")
            await held.until("x")
            held.finish("x", value)
            assert await stream.next() == {"x": value}


async def test_an_unknown_scorer_ends_the_stream(held):
    handler, sender = RewardHandler({"a": held}, "a"), Sender()
    async with Receiver(handler, sender.parts()) as stream:
        sender.send("x", options=ScoreOptions(scorer="nobody"))
        with pytest.raises(SteersmanError, match="no scorer is called 'nobody'"):
            await stream.next()


async def test_half_a_stream_fails_and_withdraws_its_items(held):
    async def broken() -> AsyncIterator[StreamPart]:
        yield StreamPart(items=items("x"))
        await held.until("x")
        raise ConnectionError("half a stream")

    handler = RewardHandler({"a": held}, "a")
    async with Receiver(handler, broken()) as stream:
        with pytest.raises(ConnectionError):
            await stream.next()
    assert held.futures["x"].cancelled()


async def test_an_empty_stream_ends_at_once(held):
    handler, sender = RewardHandler({"a": held}, "a"), Sender()
    sender.send()
    sender.end()
    assert [found async for found in handler.stream(sender.parts())] == []
