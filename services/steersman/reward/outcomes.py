"""Outcomes for protocols that know no failed items, and that may ask for a class's probability instead of a score."""

import math
from collections.abc import Sequence

from steersman.reward.types import ItemScore, Score
from steersman.wire.errors import SteersmanError


def require_scores(scores: Sequence[ItemScore]) -> list[Score]:
    """The scores, if every item has one. Else raises the first failure, naming all items that failed."""
    found = [score.outcome for score in scores if isinstance(score.outcome, Score)]
    failed = [(index, s.outcome) for index, s in enumerate(scores) if isinstance(s.outcome, SteersmanError)]
    if not failed:
        return found
    first = failed[0][1]
    numbers = ", ".join(str(index) for index, _ in failed[:20])
    raise SteersmanError(
        first.reason,
        f"{len(failed)} of {len(scores)} items failed ({numbers}); the first: {first.message}",
        violations=first.violations,
        retry_after_seconds=first.retry_after_seconds,
    )


def prediction(score: Score, *, raw: bool) -> float:
    """What a classifier of one class says: the model's own score, without what the settings add, or its sigmoid."""
    found = score.value if score.raw is None else score.raw
    if raw:
        return found
    return 1 / (1 + math.exp(-found)) if found >= 0 else math.exp(found) / (1 + math.exp(found))
