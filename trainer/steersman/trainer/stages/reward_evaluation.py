"""What held-out comparisons say about a reward model: numbers for the log, and a table to read."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch

from steersman.trainer.algorithm.preference import (
    Accuracy,
    CalibrationBin,
    accuracy,
    annotator_agreement,
    calibration_bins,
    expected_calibration_error,
)

# Subsets that get numbers of their own in the log; the table has them all.
_MAX_LOGGED_SUBSETS: Final = 32
PREFERRED_LONGER: Final = "preferred_longer"
PREFERRED_SHORTER: Final = "preferred_shorter"
SAME_LENGTH: Final = "same_length"


@dataclass(frozen=True, kw_only=True)
class JudgedPair:
    """Two responses of which a person preferred one: the score of that one less the other's, and how many tokens
    longer it is. ``key`` tells the two responses from all others, whoever judged them; ``preferred_first`` which of
    them it is, the same for all who preferred it.
    """

    gap: float
    longer_by_tokens: int
    subset: str = ""
    annotator: str = ""
    key: str = ""
    preferred_first: bool = True


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The outcome: over all pairs, by subset, by which of the two is longer, by annotator; and whether the model is as
    sure as it is right. ``agreement`` is between annotators, None where no pair was judged twice.
    """

    overall: Accuracy
    calibration: list[CalibrationBin]
    calibration_error: float
    subsets: dict[str, Accuracy] = field(default_factory=dict)
    lengths: dict[str, Accuracy] = field(default_factory=dict)
    annotators: dict[str, Accuracy] = field(default_factory=dict)
    agreement: Accuracy | None = None

    def metrics(self) -> dict[str, float]:
        """Numbers for the log, named below ``eval/``. Intervals are those of Wilson, 95 %."""
        found = {
            "accuracy": self.overall.value,
            "accuracy_low": self.overall.low,
            "accuracy_high": self.overall.high,
            "num_pairs": float(self.overall.num_pairs),
            "calibration_error": self.calibration_error,
        }
        found |= {f"{name}/accuracy": one.value for name, one in self.lengths.items()}
        for name, one in list(self.subsets.items())[:_MAX_LOGGED_SUBSETS]:
            found[f"subset/{name}/accuracy"] = one.value
        if self.agreement is not None:
            found["annotator_agreement"] = self.agreement.value
        return {f"eval/{name}": value for name, value in found.items()}

    def table(self) -> dict[str, Any]:
        """Everything, for ``evaluation.json``."""
        return asdict(self)


def evaluate_pairs(pairs: Sequence[JudgedPair]) -> Evaluation:
    """The evaluation of at least one pair."""
    overall = _accuracy(pairs)
    assert overall is not None
    gap_P = _gaps(pairs)
    bins = calibration_bins(gap_P)
    return Evaluation(
        overall=overall,
        calibration=bins,
        calibration_error=expected_calibration_error(bins),
        subsets=_by(pairs, lambda pair: pair.subset),
        lengths=_by(pairs, _length_class),
        annotators=_by(pairs, lambda pair: pair.annotator),
        agreement=annotator_agreement(_choices(pairs)),
    )


def _by(pairs: Sequence[JudgedPair], name_of: Callable[[JudgedPair], str]) -> dict[str, Accuracy]:
    """Accuracy by name, the most frequent first; pairs without a name are left out."""
    groups: dict[str, list[JudgedPair]] = defaultdict(list)
    for pair in pairs:
        if name := name_of(pair):
            groups[name].append(pair)
    ordered = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    return {name: found for name, group in ordered if (found := _accuracy(group)) is not None}


def _length_class(pair: JudgedPair) -> str:
    if pair.longer_by_tokens == 0:
        return SAME_LENGTH
    return PREFERRED_LONGER if pair.longer_by_tokens > 0 else PREFERRED_SHORTER


def _choices(pairs: Iterable[JudgedPair]) -> Iterable[dict[str, bool]]:
    judged: dict[str, dict[str, bool]] = defaultdict(dict)
    for pair in pairs:
        if pair.annotator:
            judged[pair.key][pair.annotator] = pair.preferred_first
    return judged.values()


def _accuracy(pairs: Sequence[JudgedPair]) -> Accuracy | None:
    return accuracy(_gaps(pairs))


def _gaps(pairs: Sequence[JudgedPair]) -> torch.Tensor:
    return torch.tensor([pair.gap for pair in pairs], dtype=torch.float64)
