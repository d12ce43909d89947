import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.trainer.algorithm.advantages import gae, group_relative, leave_one_out, whiten


def slow_gae(rewards, values, mask, gamma, lam):
    """Equation 16 of arXiv 1506.02438 as the sum that it is, over the counted tokens of each row."""
    advantages = [[0.0] * len(row) for row in rewards]
    for b, row in enumerate(mask):
        kept = [t for t, counted in enumerate(row) if counted]
        v = [values[b][t] for t in kept] + [0.0]
        deltas = [rewards[b][t] + gamma * v[i + 1] - v[i] for i, t in enumerate(kept)]
        for i, t in enumerate(kept):
            advantages[b][t] = sum((gamma * lam) ** (k - i) * deltas[k] for k in range(i, len(kept)))
    return advantages


numbers = st.floats(-5, 5, width=32)


@st.composite
def batches(draw):
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    matrix = st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=rows, max_size=rows)
    flags = st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows)
    return draw(matrix), draw(matrix), draw(flags)


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.95, 1.0]))
def test_gae_equals_the_slow_sum(batch, gamma, lam):
    rewards, values, mask = batch
    advantages, returns = gae(torch.tensor(rewards), torch.tensor(values), torch.tensor(mask), gamma=gamma, lam=lam)
    expected = torch.tensor(slow_gae(rewards, values, mask, gamma, lam))
    torch.testing.assert_close(advantages, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        returns, torch.where(torch.tensor(mask), expected + torch.tensor(values), 0.0), atol=1e-4, rtol=1e-4
    )


def test_gae_does_not_see_padding():
    rewards, values = torch.randn(2, 3, 6)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] + [False] * 5])
    clean, _ = gae(rewards, values, mask)
    dirty, returns = gae(rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.inf), mask)
    torch.testing.assert_close(dirty, clean)
    assert torch.isfinite(returns).all()


def test_with_lambda_one_the_return_is_the_discounted_sum_of_rewards():
    rewards, values = torch.randn(2, 1, 5)
    _, returns = gae(rewards, values, torch.ones(1, 5, dtype=torch.bool), gamma=0.9, lam=1.0)
    expected = [sum(0.9 ** (k - t) * float(rewards[0, k]) for k in range(t, 5)) for t in range(5)]
    torch.testing.assert_close(returns[0], torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_a_perfect_critic_leaves_no_advantage():
    rewards = torch.randn(2, 6)
    values = rewards.flip(1).cumsum(1).flip(1)
    advantages, _ = gae(rewards, values, torch.ones(2, 6, dtype=torch.bool), gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages, torch.zeros(2, 6), atol=1e-5, rtol=0)


def test_gae_names_what_is_out_of_range():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"lam is 1.5, must be in \[0, 1\]"):
        gae(x, x, x.bool(), lam=1.5)
    with pytest.raises(ValueError, match="mask_BT"):
        gae(x, x, torch.ones(1, 3, dtype=torch.bool))


def test_whiten_moves_only_what_it_says():
    x = torch.randn(4, 5) * 3 + 2
    mask = torch.rand(4, 5) > 0.3
    kept = whiten(x, mask)[mask]
    assert abs(kept.mean()) < 1e-5
    assert abs(kept.var(unbiased=False) - 1) < 1e-4
    unshifted = whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(unshifted[mask].mean(), x[mask].mean())
    assert (unshifted[~mask] == 0).all()


def test_whiten_with_moments_of_the_whole_batch_is_the_same_in_parts():
    x, mask = torch.randn(6, 3), torch.ones(6, 3, dtype=torch.bool)
    whole = whiten(x, mask)
    moments = {"mean": x.mean(), "var": x.var(unbiased=False)}
    parts = [whiten(x[i : i + 2], mask[i : i + 2], **moments) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_group_relative_equals_the_slow_form():
    scores = [[1.0, 2.0, 4.0], [0.5, 0.5, 0.5]]
    got = group_relative(torch.tensor(scores))
    for row, out in zip(scores, got.tolist(), strict=True):
        mean = sum(row) / len(row)
        std = (sum((s - mean) ** 2 for s in row) / (len(row) - 1)) ** 0.5
        assert out == pytest.approx([(s - mean) / (std + 1e-6) for s in row], abs=1e-5)
    assert group_relative(torch.tensor([[1.0, 3.0]]), scale_by_std=False).tolist() == [[-1.0, 1.0]]


def test_leave_one_out_equals_the_slow_form():
    scores = [[1.0, 2.0, 4.0], [0.0, -1.0, 7.0]]
    got = leave_one_out(torch.tensor(scores))
    for row, out in zip(scores, got.tolist(), strict=True):
        expected = [s - sum(o for j, o in enumerate(row) if j != i) / (len(row) - 1) for i, s in enumerate(row)]
        assert out == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", [group_relative, leave_one_out])
def test_a_sample_without_a_score_moves_nothing(estimator):
    mask = torch.tensor([[True, True, False, True]])
    got = estimator(torch.tensor([[1.0, 2.0, torch.nan, 4.0]]), mask)
    torch.testing.assert_close(got[mask], estimator(torch.tensor([[1.0, 2.0, 4.0]]))[0])
    assert got[0, 2] == 0
    assert (estimator(torch.tensor([[3.0]])) == 0).all()
