"""A scorer that combines others, so that a policy cannot please one model where the others disagree.

mean: the weighted mean. Members that disagree cancel out, but a high outlier still pays.
min: the worst member ("worst-case optimisation").
uncertainty: the weighted mean less `beta` times the spread ("uncertainty-weighted optimisation").

Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization" (arXiv:2310.02743), subtract the variance of
the members. The default here is their standard deviation, which has the unit of the score, so that `beta` does not
change its meaning with the scale of the members; `dispersion: variance` is the paper's form. Either is over the members
of the item, divided by their number.

Invariants:

- a member that fails fails the item, unless `max_failed_members` lets that many be left out, which `members` then tell;
- all members admit an item, or none does: a full queue of one withdraws it from the others;
- an item that has failed, or whose caller is gone, is withdrawn from the members that have not scored it.
"""

import asyncio
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from steersman.reward.settings import EnsembleSettings
from steersman.reward.types import (
    MemberOutcome,
    Score,
    ScoreItem,
    ScoreOptions,
    Scorer,
    ScorerKind,
    failed,
    settle,
)
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.identity import ModelInfo

logger = logging.getLogger(__name__)

_Futures = list["asyncio.Future[Score]"]


class EnsembleScorer:
    """Combines the scorers that its members' names lead to at the time."""

    kind = ScorerKind.ENSEMBLE
    model: ModelInfo | None = None

    def __init__(self, name: str, scorers: Mapping[str, Scorer], settings: EnsembleSettings) -> None:
        """`scorers` holds the members, and may change while it serves."""
        self.name = name
        self.members = tuple(settings.ensemble)
        self._scorers = scorers
        self._settings = settings

    async def submit(self, items: Sequence[ScoreItem], options: ScoreOptions) -> _Futures:
        """See `Scorer.submit`. A member's own over-length and tokenizer rules apply to its part."""
        tasks = [asyncio.create_task(self._admit(name, items, options)) for name in self.members]
        try:
            admitted = await asyncio.gather(*tasks)
        except BaseException:
            await _withdraw(tasks)
            raise
        return [
            _Combination(self._settings, [part.at(index) for part in admitted]).future for index in range(len(items))
        ]

    async def check_health(self) -> None:
        """Nothing of its own: the members are looked at as scorers."""

    async def close(self) -> None:
        """Nothing of its own: the members are closed as scorers."""

    async def _admit(self, name: str, items: Sequence[ScoreItem], options: ScoreOptions) -> "_Admitted":
        # Found here, so that nothing is awaited before it is asked: by then the name may lead elsewhere.
        scorer = self._scorers[name]
        try:
            futures = await scorer.submit(items, options)
        except SteersmanError as error:
            # A full queue is for the caller to wait out. A scorer that is gone is a member that fails.
            if error.reason is Reason.QUEUE_FULL:
                raise
            futures = [failed(error) for _ in items]
        return _Admitted(name=name, scorer=scorer, futures=futures)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """One item at one member."""

    name: str
    scorer: Scorer
    future: "asyncio.Future[Score]"

    def outcome(self) -> MemberOutcome:
        """What the member said; its future is done."""
        model = self.scorer.model
        error = self.error()
        return MemberOutcome(
            scorer=self.name,
            outcome=self.future.result() if error is None else error,
            weight=0.0,
            model=self.scorer.name if model is not None else "",
            revision=model.revision if model is not None else "",
        )

    def error(self) -> SteersmanError | None:
        """Why there is no score: the member's reason, and its name."""
        if self.future.cancelled():
            return SteersmanError(Reason.ENGINE_UNAVAILABLE, f"member {self.name}: its item was withdrawn")
        error = self.future.exception()
        if error is None:
            return None
        if not isinstance(error, SteersmanError):
            logger.error("member %s failed unexpectedly", self.name, exc_info=error)
            return SteersmanError(Reason.INTERNAL, f"member {self.name} failed; the server's log says why")
        return SteersmanError(
            error.reason,
            f"member {self.name}: {error.message}",
            code=error.code,
            violations=error.violations,
            retry_after_seconds=error.retry_after_seconds,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Admitted:
    """All items of a call at one member."""

    name: str
    scorer: Scorer
    futures: _Futures

    def at(self, index: int) -> _Part:
        return _Part(name=self.name, scorer=self.scorer, future=self.futures[index])


class _Combination:
    """One item at all members. `future` has the combined score when all are done, or fails with the first too many."""

    def __init__(self, settings: EnsembleSettings, parts: Sequence[_Part]) -> None:
        self._settings = settings
        self._parts = parts
        self._num_pending = len(parts)
        self._num_failed = 0
        self.future: asyncio.Future[Score] = asyncio.get_running_loop().create_future()
        self.future.add_done_callback(self._withdraw)
        for part in parts:
            part.future.add_done_callback(functools.partial(self._part_done, part))

    def _part_done(self, part: _Part, _: object) -> None:
        self._num_pending -= 1
        if self.future.done():
            return
        error = part.error()
        if error is not None:
            self._num_failed += 1
            if self._num_failed > self._settings.max_failed_members:
                settle(self.future, error)
                return
        if self._num_pending == 0:
            settle(self.future, combine(self._settings, [part.outcome() for part in self._parts]))

    def _withdraw(self, _: object) -> None:
        for part in self._parts:
            part.future.cancel()


def combine(settings: EnsembleSettings, parts: Sequence[MemberOutcome]) -> Score | SteersmanError:
    """The combined score of an item, at least one of whose parts did not fail. Weights are filled in."""
    scores = {part.scorer: part.outcome for part in parts if isinstance(part.outcome, Score)}
    values = {name: score.value for name, score in scores.items()}
    worst = min(values, key=lambda name: values[name])
    given = dict.fromkeys(values, 1.0)
    if settings.combine == "min":
        given = {name: float(name == worst) for name in values}
    elif settings.weights:
        given = {name: settings.weights[name] for name in values}
    total = sum(given.values())
    weights = {name: weight / total for name, weight in given.items()}
    value = sum(weights[name] * values[name] for name in values)
    centre = sum(values.values()) / len(values)
    spread = math.hypot(*(found - centre for found in values.values())) / math.sqrt(len(values))
    if settings.combine == "uncertainty":
        value -= settings.beta * (spread if settings.dispersion == "std" else spread * spread)
    if not (math.isfinite(value) and math.isfinite(spread)):
        return SteersmanError(Reason.NOT_FINITE, f"the combined score is {value}")
    return Score(
        value=value,
        raw=None,
        num_tokens=sum(score.num_tokens for score in scores.values()),
        truncated=any(score.truncated for score in scores.values()),
        members=tuple(replace(part, weight=weights.get(part.scorer, 0.0)) for part in parts),
        spread=spread,
    )


async def _withdraw(tasks: "Sequence[asyncio.Task[_Admitted]]") -> None:
    for task in tasks:
        task.cancel()
    for admitted in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(admitted, _Admitted):
            for future in admitted.futures:
                future.cancel()
