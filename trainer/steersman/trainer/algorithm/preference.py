"""How well scores agree with people: accuracy, calibration, and how far people agree with each other.

Everything is over pairs of responses of which a person preferred one; ``gap_P`` is the score of the preferred one less
the other's. A Bradley-Terry model says the person prefers it with probability ``sigmoid(gap)``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.trainer.algorithm.metrics import wilson_interval


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of pairs with the preferred response scored higher, an equal score counting one half; its 95 % Wilson
    interval. The interval takes pairs as independent; those of one long ranked list are not quite.
    """

    value: float
    low: float
    high: float
    num_pairs: int


def accuracy(gap_P: Tensor) -> Accuracy | None:
    """Accuracy over pairs ``[P]``; None without any."""
    if not len(gap_P):
        return None
    num_correct = float((gap_P > 0).sum()) + 0.5 * float((gap_P == 0).sum())
    low, high = wilson_interval(num_correct, len(gap_P))
    return Accuracy(value=num_correct / len(gap_P), low=low, high=high, num_pairs=len(gap_P))


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """Pairs in which the model is sure of its choice to a degree in [low, high): how sure, and how often right."""

    low: float
    high: float
    mean_confidence: float
    accuracy: Accuracy


def calibration_bins(gap_P: Tensor, *, num_bins: int = 10) -> list[CalibrationBin]:
    """Bins of equal width over the confidence ``max(p, 1 - p)``, from 0.5 to 1; empty ones are left out."""
    confidence_P = torch.sigmoid(gap_P.double().abs())
    width = 0.5 / num_bins
    bin_P = ((confidence_P - 0.5) / width).long().clamp(max=num_bins - 1)
    bins = []
    for number in range(num_bins):
        chosen_P = bin_P == number
        found = accuracy(gap_P[chosen_P])
        if found is not None:
            bins.append(
                CalibrationBin(
                    low=0.5 + number * width,
                    high=0.5 + (number + 1) * width,
                    mean_confidence=float(confidence_P[chosen_P].mean()),
                    accuracy=found,
                )
            )
    return bins


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Mean over pairs of ``|accuracy - confidence|`` of their bin, in [0, 1]; NaN without bins.

    Source: Guo et al., arXiv 1706.04599, equation 3.
    """
    total = sum(one.accuracy.num_pairs for one in bins)
    if not total:
        return float("nan")
    return sum(one.accuracy.num_pairs * abs(one.accuracy.value - one.mean_confidence) for one in bins) / total


def annotator_agreement(choices: Iterable[Mapping[str, bool]]) -> Accuracy | None:
    """How often two annotators of the same pair chose alike; None where no pair was judged twice.

    ``choices`` has a mapping for each pair of responses: what each annotator preferred of it, as true or false.
    Every two annotators of a pair count once. This is about what a reward model can reach: it is asked to agree with
    one of them.
    """
    num_alike = num_all = 0
    for judged in choices:
        votes = list(judged.values())
        num_for = sum(votes)
        num_against = len(votes) - num_for
        num_alike += (num_for * (num_for - 1) + num_against * (num_against - 1)) // 2
        num_all += len(votes) * (len(votes) - 1) // 2
    if not num_all:
        return None
    low, high = wilson_interval(num_alike, num_all)
    return Accuracy(value=num_alike / num_all, low=low, high=high, num_pairs=num_all)
