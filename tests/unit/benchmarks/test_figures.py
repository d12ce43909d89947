import math

import pytest
from benchmarks.figures import Target, paired_ratio, spread


@pytest.mark.parametrize(
    ("target", "value", "expected"),
    [
        (Target(what="x", at_least=1.5), 1.5, True),
        (Target(what="x", at_least=1.5), 1.49, False),
        (Target(what="x", at_most=1e-4), 1e-4, True),
        (Target(what="x", at_most=1e-4), 2e-4, False),
        (Target(what="x"), 7.0, None),
        (Target(what="x", at_least=0.0), math.nan, False),
        (Target(what="x", at_most=0.0), math.nan, False),
    ],
)
def test_a_target_is_met_at_its_bound_and_beyond(target: Target, value: float, expected: bool | None) -> None:
    assert target.met(value) is expected


def test_a_target_has_one_bound() -> None:
    with pytest.raises(ValueError, match="one bound"):
        Target(what="x", at_least=1, at_most=2)


def test_targets_in_words() -> None:
    assert [str(Target(what="x", at_least=1.5)), str(Target(what="x", at_most=1e-4)), str(Target(what="x"))] == [
        "≥ 1.5",
        "≤ 0.0001",
        "-",
    ]


def test_spread_is_median_and_quartiles() -> None:
    found = spread([4.0, 1.0, 3.0, 2.0, 100.0])
    assert (found.low, found.median, found.high, found.count) == (2.0, 3.0, 4.0, 5)


def test_spread_of_one_measurement_is_itself() -> None:
    found = spread([2.5])
    assert (found.low, found.median, found.high, found.count) == (2.5, 2.5, 2.5, 1)


def test_spread_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        spread([])


def test_a_slow_minute_leaves_the_paired_ratio_alone() -> None:
    assert paired_ratio([30.0, 3.0, 30.0], [10.0, 1.0, 10.0]).median == pytest.approx(3.0)


def test_measurements_must_pair_up() -> None:
    with pytest.raises(ValueError, match="2 numerators and 1 denominators"):
        paired_ratio([1.0, 2.0], [1.0])
