"""Seeds of the samples of one request."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.policy.engine.port import MAX_SEED, sample_seed


@given(seed=st.integers(0, MAX_SEED), index=st.integers(0, 255))
def test_seeds_are_repeatable_and_in_range(seed: int, index: int) -> None:
    found = sample_seed(seed, index)
    assert 0 <= found <= MAX_SEED
    assert found == sample_seed(seed, index)


def test_the_first_sample_has_the_seed_itself() -> None:
    assert sample_seed(MAX_SEED, 0) == MAX_SEED


def test_neighbouring_requests_share_no_sample() -> None:
    seeds = [sample_seed(seed, index) for seed in range(200) for index in range(64)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(("seed", "index", "expected"), [(7, 1, 2174948161648732372), (0, 255, 8878114381621926231)])
def test_seeds_stay_what_they_are(seed: int, index: int, expected: int) -> None:
    assert sample_seed(seed, index) == expected  # else runs cannot be repeated with a later release
