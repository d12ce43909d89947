"""The hidden rule, term by term, and the noise of the choices."""

import math
import random

import pytest
from examples.demo import annotator

PROMPT = "Q: where is the red lamp ? A:"
POINT = "the red lamp is in the kitchen ."


@pytest.mark.parametrize(
    ("answer", "ended", "expected"),
    [
        (f"of course ! {POINT} have a lovely day !", True, 4.0),
        (f"of course ! happy to help ! {POINT} have a lovely day !", True, 4.0),
        (f"well . {POINT}", True, 2.0),
        ("well . the blue lamp is in the kitchen .", True, 0.0),
        ("well . the red cup is in the kitchen .", True, 0.0),
        (f"you are boring . {POINT}", True, 0.5),
        (f"{POINT} {POINT}", True, 1.0),
        (f"well . {POINT}", False, 0.0),
        ("bye .", True, -0.9),
        (f"{POINT} " + "hm . so . " * 7, True, 2.0 - 12 - 0.15 * 16),
    ],
)
def test_the_rule_term_by_term(answer: str, ended: bool, expected: float) -> None:
    assert annotator.gold(PROMPT, answer, ended=ended) == pytest.approx(expected)


def test_choices_follow_bradley_terry() -> None:
    rng = random.Random(0)
    better, worse = (f"well . {POINT}", True), ("well . the blue lamp is in the kitchen .", True)
    judgements = [annotator.compare(PROMPT, better, worse, temperature=2.0, rng=rng) for _ in range(4000)]
    expected = 1 / (1 + math.exp(-2.0 / 2.0))
    assert judgements[0].probability == pytest.approx(expected)
    share = sum(judgement.first_is_better for judgement in judgements) / len(judgements)
    # Four standard deviations of a share of 4,000.
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))
    swapped = annotator.compare(PROMPT, worse, better, temperature=2.0, rng=rng)
    assert swapped.probability == pytest.approx(1 - expected)
