"""Scores by content: what is computed, by whom it is shared, and what is forgotten."""

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.reward.cache import CacheMetrics, ScoreCache
from steersman.reward.types import Score
from steersman.serving.batching import Priority
from steersman.serving.metrics import Metrics
from steersman.wire.errors import Reason, SteersmanError, queue_full

WAIT_S = 10


class Model:
    """Keeps what it was asked to run; the test answers."""

    def __init__(self, max_items: int = 10) -> None:
        self.metrics = Metrics("reward")
        self.cache = ScoreCache(max_items, CacheMetrics(self.metrics).observer("m"))
        self.rows: list[list[int]] = []
        self.futures: list[asyncio.Future[Score]] = []
        self.refusal: SteersmanError | None = None

    def submit(
        self,
        *rows: Sequence[int],
        priority: Priority = Priority.BULK,
        timeouts_s: Sequence[float | None] | None = None,
        offset: float = 0.0,
    ) -> list[asyncio.Future[Score]]:
        def start(chosen: list[int]) -> list[asyncio.Future[Score]]:
            if self.refusal is not None:
                raise self.refusal
            self.rows += [list(rows[index]) for index in chosen]
            self.futures += [asyncio.get_running_loop().create_future() for _ in chosen]
            return self.futures[-len(chosen) :]

        return self.cache.submit(
            [np.array(row, np.int32) for row in rows],
            priority=priority,
            timeouts_s=timeouts_s or [None] * len(rows),
            start=start,
            score=lambda index, raw: Score(value=raw + offset, raw=raw, num_tokens=len(rows[index])),
        )

    def answer(self, index: int, raw: float) -> None:
        self.futures[index].set_result(Score(value=raw, raw=raw))

    def counted(self) -> tuple[float, ...]:
        found = (
            self.metrics.registry.get_sample_value("steersman_score_cache_items_total", {"model": "m", "how": how})
            for how in ("hit", "joined", "miss")
        )
        return tuple(value or 0.0 for value in found)


async def values(futures: Sequence[asyncio.Future[Score]]) -> list[float]:
    return [score.value for score in await asyncio.wait_for(asyncio.gather(*futures), WAIT_S)]


async def test_what_was_scored_is_not_computed_again():
    model = Model()
    first = model.submit([1, 2], [3])
    model.answer(0, 0.5)
    model.answer(1, 1.5)
    assert await values(first) == [0.5, 1.5]
    assert await values(model.submit([3], [1, 2])) == [1.5, 0.5]
    assert model.rows == [[1, 2], [3]]
    assert model.counted() == (2, 0, 2)


async def test_settings_of_a_score_are_applied_to_what_is_remembered():
    model = Model()
    first = model.submit([1, 2])
    model.answer(0, 0.5)
    await values(first)
    (again,) = model.submit([1, 2], offset=-2.0)
    assert again.result() == Score(value=-1.5, raw=0.5, num_tokens=2)


async def test_identical_items_at_the_same_time_are_computed_once():
    model = Model()
    futures = [*model.submit([1], [2], [1]), *model.submit([1])]
    assert model.rows == [[1], [2]]
    assert model.counted() == (0, 2, 2)
    model.answer(0, 0.5)
    model.answer(1, 1.5)
    assert await values(futures) == [0.5, 1.5, 0.5, 0.5]


async def test_ids_that_only_look_alike_are_different():
    model = Model()
    model.submit([1, 23], [12, 3], [1, 2, 3], [256], [1, 0])
    assert len(model.rows) == 5


async def test_an_item_is_withdrawn_when_all_who_wait_for_it_are_gone():
    model = Model()
    (one,), (two,) = model.submit([1]), model.submit([1])
    one.cancel()
    await asyncio.sleep(0)
    assert not model.futures[0].cancelled()
    two.cancel()
    await asyncio.sleep(0)
    assert model.futures[0].cancelled()
    (three,) = model.submit([1])
    assert len(model.rows) == 2
    model.answer(1, 0.5)
    assert await values([three]) == [0.5]


async def test_each_who_waits_has_a_deadline_of_its_own():
    model = Model()
    (hasty,), (patient,) = model.submit([1], timeouts_s=[0.001]), model.submit([1])
    with pytest.raises(SteersmanError) as raised:
        await asyncio.wait_for(hasty, WAIT_S)
    assert raised.value.reason is Reason.DEADLINE_EXCEEDED
    model.answer(0, 0.5)
    assert await values([patient]) == [0.5]


async def test_an_urgent_item_does_not_wait_for_one_that_is_not():
    model = Model()
    (bulk,) = model.submit([1])
    (urgent,) = model.submit([1], priority=Priority.INTERACTIVE)
    (late,) = model.submit([1])
    assert len(model.rows) == 2
    model.answer(1, 0.5)
    assert await values([urgent, late]) == [0.5, 0.5]
    assert not bulk.done()
    model.answer(0, 0.5)
    assert await values([bulk]) == [0.5]


async def test_an_error_is_shared_but_not_remembered():
    model = Model()
    futures = [*model.submit([1]), *model.submit([1])]
    model.futures[0].set_exception(SteersmanError(Reason.NOT_FINITE, "nan"))
    for future in futures:
        with pytest.raises(SteersmanError, match="nan"):
            await asyncio.wait_for(future, WAIT_S)
    assert len(model.cache) == 0
    again = model.submit([1])
    model.answer(1, 0.5)
    assert await values(again) == [0.5]


async def test_a_refusal_leaves_nothing_behind():
    model = Model()
    model.refusal = queue_full("the queue", 1, 0.5)
    with pytest.raises(SteersmanError):
        model.submit([1])
    model.refusal = None
    again = model.submit([1])
    model.answer(0, 0.5)
    assert await values(again) == [0.5]
    assert model.counted() == (0, 0, 1)


async def test_the_least_recently_used_goes_first():
    model = Model(max_items=2)
    for token in (1, 2):
        futures = model.submit([token])
        model.answer(token - 1, float(token))
        await values(futures)
    model.submit([1])
    futures = model.submit([3])
    model.answer(2, 3.0)
    await values(futures)
    assert len(model.cache) == 2
    model.submit([1], [3])
    assert model.rows == [[1], [2], [3]]
    model.submit([2])
    assert model.rows[-1] == [2]


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["submit", "cancel", "land", "fail"])), max_size=30))
def test_whatever_happens_nobody_waits_for_ever(steps):
    async def play() -> None:
        model = Model(max_items=2)
        waiting: list[asyncio.Future[Score]] = []
        for token, what in steps:
            if what == "submit":
                waiting += model.submit([token])
            elif what == "cancel" and waiting:
                waiting[token % len(waiting)].cancel()
            elif what in ("land", "fail") and model.futures:
                future = model.futures[token % len(model.futures)]
                if not future.done() and what == "land":
                    future.set_result(Score(value=1.0, raw=1.0))
                elif not future.done():
                    future.set_exception(SteersmanError(Reason.SCORER_FAILED, "as told"))
            await asyncio.sleep(0)
        for future in model.futures:
            if not future.done():
                future.set_result(Score(value=1.0, raw=1.0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert all(future.done() for future in waiting)
        assert len(model.cache) <= 2
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(play())
