"""`steersman rewards check`: whether a server gives the scores that the training of its model ended with."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from steersman.cli.console import CommandError, InputError
from steersman.client.reward import RewardClient
from steersman.client.reward_models import RewardModelClient
from steersman.client.types import ScoreItem

_FILE_NAME: Final = "scores.json"

TOLERANCE: Final = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
"""By dtype, of a score up to 1; a larger score may be off by so much of itself."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Items with the raw scores that training ended with, and the dtype that it computed in ("" if not known)."""

    items: tuple[ScoreItem, ...]
    raw_scores: tuple[float, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """How far a server is from that.

    Attributes:
        difference: the largest, absolute; `item` is where.
        excess: the largest difference in units of what is allowed there: at most 1 is good.
        dtype: what the model is served in; model, revision: who answered.
    """

    difference: float
    item: int
    excess: float
    tolerance: float
    dtype: str
    model: str
    revision: str

    @property
    def is_good(self) -> bool:
        """True if no score is off by more than allowed."""
        return self.excess <= 1.0


def read(path: Path) -> Expected:
    """The scores of a run folder, of the model in it, or of a file. InputError for what is none."""
    if path.is_dir():
        folders = (path, path.parent) if path.resolve().name == "model" else (path,)
        path = next((one / _FILE_NAME for one in folders if (one / _FILE_NAME).is_file()), path / _FILE_NAME)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON: {error}") from None
    rows = content.get("items") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: has no items, allowed: what the reward_model stage writes")
    items = [_item(row, f"{path}: items[{number}]") for number, row in enumerate(rows)]
    return Expected(
        items=tuple(ScoreItem(prompt=row["prompt"], response=row["response"]) for row in items),
        raw_scores=tuple(float(row["raw_score"]) for row in items),
        dtype=str(content.get("dtype", "")),
    )


def _item(row: Any, where: str) -> dict[str, Any]:
    def is_ids(value: object) -> bool:
        return isinstance(value, list) and all(type(one) is int for one in value)

    score = row.get("raw_score") if isinstance(row, dict) else None
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise InputError(f"{where}: raw_score is {score!r}, allowed: a finite number")
    if not is_ids(row.get("prompt")) or not is_ids(row.get("response")):
        raise InputError(f"{where}: prompt and response must both be lists of token ids")
    found: dict[str, Any] = row
    return found


def compare(
    client: RewardClient,
    models: RewardModelClient,
    expected: Expected,
    *,
    scorer: str,
    tolerance: float | None,
    timeout: float | None,
) -> Check:
    """Asks a server for the same scores. CommandError for an item without one, or if several models answered."""
    scores = client.score(expected.items, scorer=scorer, include_raw=True, timeout=timeout)
    for number, score in enumerate(scores):
        if score.error is not None:
            raise CommandError(f"items[{number}] has no score: {score.error}")
    who = {(score.model, score.revision) for score in scores}
    if len(who) > 1 or any(score.raw is None or not score.model for score in scores):
        raise CommandError("scores came from a function, an ensemble or several models, allowed: one reward model")
    ((model, revision),) = who
    found = models.get(model).model
    dtype = found.dtype if found is not None else ""
    if tolerance is None:
        # Training and serving both round: the coarser of the two decides.
        tolerance = max(TOLERANCE.get(one, TOLERANCE["float32"]) for one in (dtype, expected.dtype))
    differences = [abs((score.raw or 0.0) - raw) for score, raw in zip(scores, expected.raw_scores, strict=True)]
    item = max(range(len(differences)), key=differences.__getitem__)
    return Check(
        difference=differences[item],
        item=item,
        excess=max(
            difference / (tolerance * max(1.0, abs(raw)))
            for difference, raw in zip(differences, expected.raw_scores, strict=True)
        ),
        tolerance=tolerance,
        dtype=dtype,
        model=model,
        revision=revision,
    )
