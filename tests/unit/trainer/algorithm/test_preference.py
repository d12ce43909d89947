import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steersman.trainer.algorithm.metrics import wilson_interval
from steersman.trainer.algorithm.preference import (
    accuracy,
    annotator_agreement,
    calibration_bins,
    expected_calibration_error,
)

GAPS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=40)


def test_an_equal_score_is_half_right():
    found = accuracy(torch.tensor([1.0, -2.0, 0.0, 0.5]))
    assert found is not None
    assert (found.value, found.num_pairs) == (2.5 / 4, 4)
    assert (found.low, found.high) == wilson_interval(2.5, 4)
    assert accuracy(torch.tensor([])) is None


@given(GAPS)
def test_bins_hold_every_pair_once_and_match_a_plain_loop(gaps):
    bins = calibration_bins(torch.tensor(gaps), num_bins=5)
    assert sum(one.accuracy.num_pairs for one in bins) == len(gaps)
    for one in bins:
        confidences = []
        for gap in gaps:
            confidence = 1 / (1 + math.exp(-abs(gap)))
            place = min(4, int((confidence - 0.5) / 0.1))
            if math.isclose(one.low, 0.5 + place * 0.1):
                confidences.append(confidence)
        assert len(confidences) == one.accuracy.num_pairs
        assert one.mean_confidence == pytest.approx(sum(confidences) / len(confidences), abs=1e-6)


def test_a_calibrated_model_has_no_error_and_one_that_is_too_sure_has():
    # Sure to 0.75: right three times in four.
    gap = math.log(3)
    fair = torch.tensor([gap, gap, gap, -gap])
    assert expected_calibration_error(calibration_bins(fair)) == pytest.approx(0.0, abs=1e-6)
    boastful = torch.tensor([20.0, -20.0])
    assert expected_calibration_error(calibration_bins(boastful)) == pytest.approx(0.5, abs=1e-6)
    assert math.isnan(expected_calibration_error([]))


@given(st.lists(st.lists(st.booleans(), max_size=5), max_size=8))
def test_agreement_is_over_every_two_annotators_of_a_pair(votes):
    pairs = [one == other for row in votes for one, other in combinations(row, 2)]
    found = annotator_agreement({str(n): vote for n, vote in enumerate(row)} for row in votes)
    if not pairs:
        assert found is None
    else:
        assert found is not None
        assert (found.value, found.num_pairs) == (sum(pairs) / len(pairs), len(pairs))
