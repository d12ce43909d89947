import math
import statistics

import pytest
import torch

from steersman.trainer.algorithm.metrics import (
    MetricSums,
    explained_variance,
    masked_mean,
    masked_sum,
    masked_var,
    wilson_interval,
)


def test_masked_statistics_equal_the_library_on_the_counted_entries():
    x, mask = torch.randn(5, 6) + 100, torch.rand(5, 6) > 0.4
    kept = x[mask].tolist()
    soiled = x.masked_fill(~mask, torch.nan)
    assert float(masked_sum(soiled, mask)) == pytest.approx(sum(kept), rel=1e-5)
    assert float(masked_mean(soiled, mask)) == pytest.approx(statistics.fmean(kept), rel=1e-5)
    assert float(masked_var(soiled, mask)) == pytest.approx(statistics.pvariance(kept), rel=1e-3)
    assert float(masked_var(soiled, mask, unbiased=True)) == pytest.approx(statistics.variance(kept), rel=1e-3)


def test_nothing_counted_is_zero_and_not_nan():
    x, mask = torch.ones(3), torch.zeros(3, dtype=torch.bool)
    assert float(masked_mean(x, mask)) == 0
    assert float(masked_var(x, mask)) == 0


def test_explained_variance():
    returns, mask = torch.randn(50), torch.ones(50, dtype=torch.bool)
    assert float(explained_variance(returns, returns, mask)) == pytest.approx(1.0)
    assert float(explained_variance(torch.full((50,), 0.3), returns, mask)) == pytest.approx(0.0, abs=1e-5)
    assert float(explained_variance(-returns, returns, mask)) == pytest.approx(-3.0, rel=1e-4)
    assert math.isnan(float(explained_variance(returns, torch.ones(50), mask)))


def test_wilson_interval():
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 5)[0] == 0.0
    assert wilson_interval(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="successes is 6"):
        wilson_interval(6, 5)


def test_sums_give_the_mean_over_tokens_not_over_batches():
    sums = MetricSums()
    sums.add({"a": torch.tensor(3.0)}, count=torch.tensor(10))
    sums.add({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, count=30)
    assert sums.means() == {"a": pytest.approx(0.1), "b": pytest.approx(2 / 30)}


def test_a_count_of_zero_is_nan():
    sums = MetricSums()
    sums.add({"a": torch.tensor(0.0)}, count=0)
    assert math.isnan(sums.means()["a"])
