"""Combined scores: the arithmetic, members that fail, and what is withdrawn."""

import asyncio
import math
from collections.abc import Sequence

import numpy as np
import pytest

from steersman.reward.ensemble import EnsembleScorer, combine
from steersman.reward.settings import EnsembleSettings
from steersman.reward.types import MemberOutcome, Score, ScoreItem, ScoreOptions, ScorerKind, TextContent
from steersman.wire.errors import Code, Reason, SteersmanError, queue_full, unavailable
from steersman.wire.identity import ModelInfo

WAIT_S = 10
ITEM = ScoreItem(id="x", content=TextContent(prompt="p", response="r"))


def settings(*members: str, **fields) -> EnsembleSettings:
    return EnsembleSettings(ensemble=list(members), **fields)


def parts(**values: float) -> list[MemberOutcome]:
    return [
        MemberOutcome(scorer=name, outcome=Score(value=value, raw=value, num_tokens=3), weight=0.0)
        for name, value in values.items()
    ]


def combined(chosen: EnsembleSettings, found: list[MemberOutcome]) -> Score:
    score = combine(chosen, found)
    assert isinstance(score, Score)
    return score


def test_the_mean_and_the_spread():
    score = combined(settings("a", "b", "c"), parts(a=1.0, b=2.0, c=6.0))
    assert score.value == pytest.approx(3.0)
    assert score.spread == pytest.approx(np.std([1.0, 2.0, 6.0]))
    assert [member.weight for member in score.members] == pytest.approx([1 / 3] * 3)
    assert score.num_tokens == 9
    assert score.raw is None


def test_the_weighted_mean():
    score = combined(settings("a", "b", weights={"a": 3, "b": 1}), parts(a=1.0, b=5.0))
    assert score.value == pytest.approx(2.0)
    assert [member.weight for member in score.members] == pytest.approx([0.75, 0.25])


def test_the_worst_member():
    score = combined(settings("a", "b", "c", combine="min"), parts(a=1.0, b=-2.0, c=6.0))
    assert score.value == -2.0
    assert [member.weight for member in score.members] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("dispersion", ["std", "variance"])
def test_disagreement_costs(dispersion):
    values = [1.0, 2.0, 6.0]
    chosen = settings("a", "b", "c", combine="uncertainty", beta=0.5, dispersion=dispersion)
    score = combined(chosen, parts(**dict(zip("abc", values, strict=True))))
    cost = np.std(values) if dispersion == "std" else np.var(values)
    assert score.value == pytest.approx(3.0 - 0.5 * cost)
    assert score.spread == pytest.approx(np.std(values))


def test_members_that_agree_cost_nothing():
    score = combined(settings("a", "b", combine="uncertainty", beta=9.0), parts(a=2.5, b=2.5))
    assert (score.value, score.spread) == (2.5, 0.0)


def test_a_part_that_failed_has_no_weight_and_no_say():
    found = [*parts(a=1.0, b=5.0), MemberOutcome(scorer="c", outcome=unavailable("gone"), weight=0.0)]
    score = combined(settings("a", "b", "c", weights={"a": 1, "b": 3, "c": 9}, max_failed_members=1), found)
    assert score.value == pytest.approx(4.0)
    assert [member.weight for member in score.members] == pytest.approx([0.25, 0.75, 0.0])
    assert score.spread == pytest.approx(2.0)


def test_a_sum_that_overflows_is_an_error():
    outcome = combine(settings("a", "b", combine="uncertainty", beta=1e300), parts(a=1e300, b=-1e300))
    assert isinstance(outcome, SteersmanError)
    assert outcome.reason is Reason.NOT_FINITE


class Member:
    """Hands its futures to the test, or refuses."""

    def __init__(self, name: str, refusal: SteersmanError | None = None, revision: str = "") -> None:
        self.name = name
        self.kind = ScorerKind.MODEL if revision else ScorerKind.FUNCTION
        self.model = ModelInfo(name="m", revision=revision) if revision else None
        self.refusal = refusal
        self.futures: list[asyncio.Future[Score]] = []
        self.asked = asyncio.Event()

    async def submit(self, items: Sequence[ScoreItem], options: ScoreOptions) -> list[asyncio.Future[Score]]:
        self.asked.set()
        if self.refusal is not None:
            raise self.refusal
        self.futures += [asyncio.get_running_loop().create_future() for _ in items]
        return self.futures[-len(items) :]

    def answer(self, value: float) -> None:
        self.futures[-1].set_result(Score(value=value, raw=2 * value))

    async def check_health(self) -> None:
        return None

    async def close(self) -> None:
        return None


def ensemble(members: Sequence[Member], **fields) -> EnsembleScorer:
    chosen = settings(*(member.name for member in members), **fields)
    return EnsembleScorer("both", {member.name: member for member in members}, chosen)


async def test_every_part_says_who_gave_it():
    a, b = Member("a", revision="r7"), Member("b")
    (future,) = await ensemble([a, b]).submit([ITEM], ScoreOptions())
    b.answer(3.0)
    a.answer(1.0)
    score = await asyncio.wait_for(future, WAIT_S)
    assert score.value == 2.0
    assert [(part.scorer, part.model, part.revision) for part in score.members] == [("a", "a", "r7"), ("b", "", "")]
    assert [part.outcome for part in score.members] == [Score(value=1.0, raw=2.0), Score(value=3.0, raw=6.0)]


async def test_a_member_that_fails_fails_the_item_at_once_and_withdraws_it_from_the_others():
    a, b = Member("a"), Member("b")
    (future,) = await ensemble([a, b]).submit([ITEM], ScoreOptions())
    b.futures[0].set_exception(SteersmanError(Reason.NOT_FINITE, "gave nan"))
    with pytest.raises(SteersmanError, match="member b: gave nan") as raised:
        await asyncio.wait_for(future, WAIT_S)
    assert (raised.value.reason, raised.value.code) == (Reason.NOT_FINITE, Code.INTERNAL)
    assert a.futures[0].cancelled()


async def test_the_private_text_of_a_defect_is_not_told():
    a, b = Member("a"), Member("b")
    (future,) = await ensemble([a, b]).submit([ITEM], ScoreOptions())
    a.futures[0].set_exception(RuntimeError("private"))
    with pytest.raises(SteersmanError) as raised:
        await asyncio.wait_for(future, WAIT_S)
    assert raised.value.reason is Reason.INTERNAL
    assert "member a" in raised.value.message
    assert "private" not in raised.value.message


async def test_so_many_members_may_fail_as_the_settings_say():
    members = [Member("a"), Member("b"), Member("c")]
    one, two = await ensemble(members, max_failed_members=1).submit([ITEM, ITEM], ScoreOptions())
    for member, outcomes in zip(members, [(1.0, 1.0), (None, None), (4.0, None)], strict=True):
        for future, value in zip(member.futures, outcomes, strict=True):
            if value is None:
                future.set_exception(SteersmanError(Reason.SCORER_FAILED, "raised"))
            else:
                future.set_result(Score(value=value, raw=value))
    score = await asyncio.wait_for(one, WAIT_S)
    assert score.value == 2.5
    assert isinstance(score.members[1].outcome, SteersmanError)
    with pytest.raises(SteersmanError, match="member [bc]: raised"):
        await asyncio.wait_for(two, WAIT_S)


async def test_a_full_queue_of_one_member_withdraws_the_items_from_all():
    a, b = Member("a"), Member("b", refusal=queue_full("the queue", 1, 0.5))
    with pytest.raises(SteersmanError) as raised:
        await ensemble([a, b], max_failed_members=1).submit([ITEM, ITEM], ScoreOptions())
    assert raised.value.retry_after_seconds == 0.5
    assert all(future.cancelled() for future in a.futures)


async def test_a_member_that_is_gone_is_a_member_that_fails():
    a, b = Member("a"), Member("b", refusal=unavailable("shutting down"))
    (future,) = await ensemble([a, b]).submit([ITEM], ScoreOptions())
    with pytest.raises(SteersmanError, match="member b: shutting down"):
        await asyncio.wait_for(future, WAIT_S)
    (future,) = await ensemble([a, b], max_failed_members=1).submit([ITEM], ScoreOptions())
    a.answer(4.0)
    assert (await asyncio.wait_for(future, WAIT_S)).value == 4.0


async def test_a_caller_who_goes_takes_the_item_from_all_members():
    a, b = Member("a"), Member("b")
    (future,) = await ensemble([a, b]).submit([ITEM], ScoreOptions())
    future.cancel()
    await asyncio.sleep(0)
    assert a.futures[0].cancelled()
    assert b.futures[0].cancelled()


async def test_a_caller_who_goes_during_admission_takes_the_items_along():
    class Slow(Member):
        async def submit(self, items, options):
            self.asked.set()
            await asyncio.Event().wait()

    a, b = Member("a"), Slow("b")
    task = asyncio.create_task(ensemble([a, b]).submit([ITEM], ScoreOptions()))
    await asyncio.wait_for(b.asked.wait(), WAIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(future.cancelled() for future in a.futures)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ensemble": ["a"]}, "at least 2"),
        ({"ensemble": ["a", "a"]}, "each scorer once"),
        ({"ensemble": ["a", "b"], "weights": {"a": 1}}, "weights: are for"),
        ({"ensemble": ["a", "b"], "weights": {"a": 1, "b": 0}}, "above 0"),
        ({"ensemble": ["a", "b"], "weights": {"a": 1, "b": math.inf}}, "finite"),
        ({"ensemble": ["a", "b"], "weights": {"a": 1, "b": 2}, "combine": "min"}, "none for min"),
        ({"ensemble": ["a", "b"], "max_failed_members": 2}, "allowed: 0 to 1"),
        ({"ensemble": ["a", "b"], "beta": -1}, "greater than or equal to 0"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        EnsembleSettings(**fields)
