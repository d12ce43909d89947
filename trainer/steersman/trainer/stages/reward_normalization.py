"""The scale of a reward model's scores, fitted on a reference set and stored beside the model.

InstructGPT (arXiv:2203.02155) shifts rewards so that the demonstrations have mean 0 before it starts PPO. The offset of
a Bradley-Terry model means nothing, and its scale follows the noise of its labels: with mean 0 and standard deviation 1
on good responses, KL coefficients, length penalties and the members of an ensemble keep their meaning from one model to
the next.
"""

from typing import Any, Final

from torch import Tensor

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
