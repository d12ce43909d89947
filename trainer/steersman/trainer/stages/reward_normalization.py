"""The scale of a reward model's scores, fitted on a reference set and stored beside the model.

InstructGPT (arXiv:2203.02155) shifts rewards so that the demonstrations have mean 0 before it starts PPO. The offset of
a Bradley-Terry model means nothing, and its scale follows the noise of its labels: with mean 0 and standard deviation 1
on good responses, KL coefficients, length penalties and the members of an ensemble keep their meaning from one model to
the next.
"""

import json
import math
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from steersman.trainer.checkpoint.atomic import CheckpointError

# The reward service looks for this name beside a model.
FILE_NAME: Final = "reward_normalization.json"
_VERSION: Final = 1

# Their mean is exact to a thirtieth of the spread, and costs seconds.
NUM_COMPARISONS: Final = 512


def evenly(num_records: int, limit: int = NUM_COMPARISONS) -> list[int]:
    """At most `limit` record numbers, spread over all: a file may be sorted."""
    count = min(num_records, limit)
    return [index * num_records // count for index in range(count)]


def fit(scores_N: Tensor, reference: str) -> dict[str, Any] | None:
    """What the file says of raw scores on a reference set; None if they are all the same, and give no scale.

    The standard deviation is that of the population. ``reference`` says what was scored, for people.
    """
    scores_N = scores_N.double()
    mean, std = float(scores_N.mean()), float(scores_N.std(unbiased=False))
    if not std > 0:
        return None
    return {"version": _VERSION, "mean": mean, "std": std, "num_responses": len(scores_N), "reference": reference}


def stored(folder: Path, config: Any) -> tuple[float, float] | None:
    """Mean and standard deviation that the reward service takes for the model in `folder`: those of the file beside it,
    else `reward_mean` and `reward_std` of its configuration. None if it has neither; CheckpointError if they are of no
    use.
    """
    path = folder / FILE_NAME
    if path.is_file():
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not isinstance(told, dict) or told.get("version") != _VERSION:
            raise CheckpointError(f"{path} is of another form, must be an object with version {_VERSION}")
        mean, std = told.get("mean"), told.get("std")
    else:
        mean, std = getattr(config, "reward_mean", None), getattr(config, "reward_std", None)
        if mean is None and std is None:
            return None
        path, mean, std = folder / "config.json", 0.0 if mean is None else mean, 1.0 if std is None else std
    numbers = [float(x) for x in (mean, std) if isinstance(x, int | float) and math.isfinite(x)]
    if len(numbers) != 2 or numbers[1] <= 0:
        raise CheckpointError(f"{path} says mean {mean!r} and std {std!r}, must be finite, and std above 0")
    return numbers[0], numbers[1]
