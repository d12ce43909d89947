"""Scoring functions that work, raise, hang, return nonsense or too little."""

import asyncio
import json
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from steersman.reward.function_scorer import FunctionScorer
from steersman.reward.plugin import ChatTurn, ScorerInput, load_function
from steersman.reward.settings import FunctionScorerSettings
from steersman.reward.types import ChatContent, Score, ScoreItem, ScoreOptions, TextContent, TokenContent
from steersman.wire.errors import Reason, SteersmanError

WAIT_S = 10


def scorer_of(function, **settings) -> FunctionScorer:
    return FunctionScorer("rule", function, FunctionScorerSettings(function="m:f", **settings))


def texts(*responses: str, **fields) -> list[ScoreItem]:
    return [ScoreItem(id=text, content=TextContent(prompt="p", response=text), **fields) for text in responses]


async def outcomes(scorer: FunctionScorer, items: list[ScoreItem]) -> list[float | Reason | None]:
    """The score of each item, or the reason why there is none."""
    futures = await scorer.submit(items, ScoreOptions())
    found = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), WAIT_S)
    return [item.value if isinstance(item, Score) else item.reason for item in found]


def length(items: Sequence[ScorerInput]) -> list[float]:
    return [float(len(item.response)) for item in items]


async def async_length(items: Sequence[ScorerInput]) -> list[float]:
    await asyncio.sleep(0)
    return length(items)


@pytest.mark.parametrize(
    "function",
    [length, async_length, lambda items: np.array(length(items)), lambda items: tuple(map(int, length(items)))],
    ids=["list", "async", "array", "ints"],
)
async def test_scores_in_order(function):
    scorer = scorer_of(function)
    assert await outcomes(scorer, texts("aaa", "b", "cc")) == [3.0, 1.0, 2.0]
    await scorer.close()


async def test_what_a_function_sees():
    seen: list[ScorerInput] = []

    def spy(items: Sequence[ScorerInput]) -> list[float]:
        seen.extend(items)
        return [0.0] * len(items)

    turns = (ChatTurn(role="user", content="q1"), ChatTurn(role="user", content="q2"))
    reply = ChatTurn(role="assistant", content="a")
    scorer = scorer_of(spy)
    await outcomes(
        scorer,
        [
            *texts("r", context={"ground_truth": "42"}),
            ScoreItem(id="c", content=ChatContent(messages=turns, response=reply)),
        ],
    )
    assert seen[0] == ScorerInput(prompt="p", response="r", context={"ground_truth": "42"})
    assert seen[1] == ScorerInput(prompt="q2", response="a", messages=turns)
    await scorer.close()


async def test_runs_off_the_event_loop():
    threads: list[threading.Thread] = []

    def spy(items: Sequence[ScorerInput]) -> list[float]:
        threads.append(threading.current_thread())
        return [0.0] * len(items)

    scorer = scorer_of(spy)
    await outcomes(scorer, texts("a"))
    assert threads[0] is not threading.current_thread()
    assert threads[0].daemon
    await scorer.close()


async def test_a_raise_fails_only_the_item_that_causes_it_and_keeps_its_text_private():
    def fussy(items: Sequence[ScorerInput]) -> list[float]:
        if any(item.response == "bad" for item in items):
            raise RuntimeError("secret: bad")
        return length(items)

    scorer = scorer_of(fussy)
    assert await outcomes(scorer, texts("a", "bad", "cc")) == [1.0, Reason.SCORER_FAILED, 2.0]
    (future,) = await scorer.submit(texts("bad"), ScoreOptions())
    with pytest.raises(SteersmanError) as raised:
        await future
    assert raised.value.message == "scorer rule raised RuntimeError"
    await scorer.close()


@pytest.mark.parametrize("error", [StopIteration, SystemExit, KeyboardInterrupt, TimeoutError])
async def test_odd_exceptions_are_failures_too(error):
    def odd(items: Sequence[ScorerInput]) -> list[float]:
        raise error

    scorer = scorer_of(odd)
    assert await outcomes(scorer, texts("a", "b")) == [Reason.SCORER_FAILED] * 2
    await scorer.close()


async def test_a_hang_fails_only_the_item_that_causes_it():
    release = threading.Event()

    def slow(items: Sequence[ScorerInput]) -> list[float]:
        if any(item.response == "hang" for item in items):
            release.wait(WAIT_S)
        return length(items)

    scorer = scorer_of(slow, timeout_seconds=0.05)
    assert await outcomes(scorer, texts("a", "hang", "cc")) == [1.0, Reason.SCORER_FAILED, 2.0]
    release.set()
    assert await outcomes(scorer, texts("dddd")) == [4.0]
    await scorer.close()


async def test_an_async_hang_is_cancelled():
    cancelled = threading.Event()

    async def slow(items: Sequence[ScorerInput]) -> list[float]:
        try:
            await asyncio.sleep(WAIT_S)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return length(items)

    scorer = scorer_of(slow, timeout_seconds=0.05)
    assert await outcomes(scorer, texts("a")) == [Reason.SCORER_FAILED]
    assert await asyncio.to_thread(cancelled.wait, WAIT_S)
    await scorer.close()


async def test_too_many_hanging_calls_stop_further_ones_until_they_return(monkeypatch):
    monkeypatch.setattr("steersman.reward.function_scorer._MAX_LEFT_BEHIND", 2)
    release, calls = threading.Event(), threading.Semaphore(0)

    def hang(items: Sequence[ScorerInput]) -> list[float]:
        calls.release()
        release.wait(WAIT_S)
        return length(items)

    scorer = scorer_of(hang, timeout_seconds=0.02)
    assert await outcomes(scorer, texts("a")) == [Reason.SCORER_FAILED]
    assert await outcomes(scorer, texts("b")) == [Reason.SCORER_FAILED]
    with pytest.raises(SteersmanError, match="2 calls of scorer rule hang"):
        await scorer.check_health()
    assert await outcomes(scorer, texts("c")) == [Reason.SCORER_FAILED]
    assert [calls.acquire(blocking=False) for _ in range(3)] == [True, True, False]
    release.set()
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await scorer.check_health()
                break
            except SteersmanError:
                await asyncio.sleep(0.001)
    await scorer.close()


@pytest.mark.parametrize(
    ("returned", "reasons"),
    [
        ([1.0, None], [1.0, Reason.SCORER_FAILED]),
        ([1.0, float("nan")], [1.0, Reason.NOT_FINITE]),
        ([1.0, float("-inf")], [1.0, Reason.NOT_FINITE]),
        ([1.0, [2.0]], [1.0, Reason.SCORER_FAILED]),
        ([1.0, "high"], [1.0, Reason.SCORER_FAILED]),
        ([1.0, 10**400], [1.0, Reason.SCORER_FAILED]),
        ([True, np.float32(2)], [1.0, 2.0]),
        ([1.0, 2.0, 3.0], [Reason.SCORER_FAILED] * 2),
        (None, [Reason.SCORER_FAILED] * 2),
        (3.0, [Reason.SCORER_FAILED] * 2),
        ("ab", [Reason.SCORER_FAILED] * 2),
        ({0: 1.0, 1: 2.0}, [Reason.SCORER_FAILED] * 2),
    ],
)
async def test_what_is_not_a_finite_number_is_not_a_score(returned, reasons):
    scorer = scorer_of(lambda items: returned)
    assert await outcomes(scorer, texts("a", "b")) == reasons
    await scorer.close()


async def test_calls_are_bounded_in_size_and_number():
    sizes: list[int] = []
    running, most = 0, 0
    lock = threading.Lock()
    barrier = threading.Barrier(2, timeout=WAIT_S)

    def spy(items: Sequence[ScorerInput]) -> list[float]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            sizes.append(len(items))
        # Passes only if exactly two calls are there at a time.
        barrier.wait()
        with lock:
            running -= 1
        return length(items)

    scorer = scorer_of(spy, max_batch_items=3, max_concurrency=2)
    assert await outcomes(scorer, texts(*"abcdefghijkl")) == [1.0] * 12
    assert sizes == [3, 3, 3, 3]
    assert most == 2
    await scorer.close()


async def test_a_full_queue_refuses_and_the_deadline_of_an_item_holds():
    entered, release = threading.Semaphore(0), threading.Event()

    def gated(items: Sequence[ScorerInput]) -> list[float]:
        entered.release()
        release.wait(WAIT_S)
        return length(items)

    scorer = scorer_of(gated, max_queue_items=2, max_concurrency=1)
    first = await scorer.submit(texts("a"), ScoreOptions())
    assert await asyncio.to_thread(entered.acquire, timeout=WAIT_S)
    (late,) = await scorer.submit(texts("b", timeout_s=0.001), ScoreOptions())
    with pytest.raises(SteersmanError) as refused:
        await scorer.submit(texts("c"), ScoreOptions())
    assert refused.value.reason is Reason.QUEUE_FULL
    assert refused.value.retry_after_seconds is not None
    with pytest.raises(SteersmanError) as expired:
        await late
    assert expired.value.reason is Reason.DEADLINE_EXCEEDED
    release.set()
    assert (await first[0]).value == 1.0
    # The expired item was never handed to the function.
    assert await outcomes(scorer, texts("dd")) == [2.0]
    assert [entered.acquire(blocking=False) for _ in range(2)] == [True, False]
    await scorer.close()


async def test_bad_content_fails_its_item_only():
    scorer = scorer_of(length)
    tokens = TokenContent(prompt=np.array([1], np.int32), response=np.array([2], np.int32))
    items = [*texts("aa", ""), ScoreItem(id="n", content=None), ScoreItem(id="t", content=tokens)]
    assert await outcomes(scorer, items) == [2.0] + [Reason.INVALID_FIELD] * 3
    await scorer.close()


async def test_closing_fails_what_waits():
    release, entered = threading.Event(), threading.Event()

    def gated(items: Sequence[ScorerInput]) -> list[float]:
        entered.set()
        release.wait(WAIT_S)
        return length(items)

    scorer = scorer_of(gated)
    (future,) = await scorer.submit(texts("a"), ScoreOptions())
    assert await asyncio.to_thread(entered.wait, WAIT_S)
    await scorer.close()
    with pytest.raises(SteersmanError) as raised:
        await future
    assert raised.value.reason is Reason.ENGINE_UNAVAILABLE
    with pytest.raises(SteersmanError, match="shutting down"):
        await scorer.submit(texts("a"), ScoreOptions())
    release.set()


def test_load_function_from_module_and_file(tmp_path):
    assert load_function("f", "json:dumps") is json.dumps
    path = tmp_path / "rules.py"
    path.write_text("class Rules:\n    @staticmethod\n    def score(items):\n        return [0.0] * len(items)\n")
    assert load_function("f", f"{path}:Rules.score")([1, 2]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no.such.module:f", "cannot be imported"),
        ("math:no_such_name", "cannot be imported"),
        ("/no/such/file.py:f", "cannot be imported"),
        ("math:pi", "a float, allowed: a function"),
        ("math:pow", "a function of one list"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_named(target, message):
    with pytest.raises(ValueError, match=r"^scorers\.x\.function: is .*" + message):
        load_function("scorers.x.function", target)
