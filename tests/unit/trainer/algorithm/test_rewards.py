import pytest
import torch

from steersman.trainer.algorithm.rewards import (
    clip_scores,
    penalise_missing_eos,
    token_rewards,
    whiten_rewards,
)


def test_token_rewards_equal_the_slow_form():
    kl = torch.randn(3, 4)
    scores = [1.0, -2.0, 5.0]
    mask = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    got = token_rewards(kl, torch.tensor(scores), mask, kl_coef=0.1)
    for b in range(3):
        counted = [t for t in range(4) if mask[b, t]]
        for t in range(4):
            expected = -0.1 * float(kl[b, t]) if t in counted else 0.0
            if counted and t == counted[-1]:
                expected += scores[b]
            assert float(got[b, t]) == pytest.approx(expected, abs=1e-6)


def test_the_total_reward_is_score_less_the_kl_paid():
    kl, scores, mask = torch.rand(2, 5), torch.tensor([0.3, 0.9]), torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(token_rewards(kl, scores, mask, kl_coef=0.2).sum(1), scores - 0.2 * kl.sum(1))


def test_padding_may_hold_anything():
    mask = torch.tensor([[True, False]])
    got = token_rewards(torch.tensor([[1.0, torch.nan]]), torch.tensor([1.0]), mask, kl_coef=1.0)
    assert got.tolist() == [[0.0, 0.0]]


def test_missing_eos():
    scores, ended = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    assert penalise_missing_eos(scores, ended, penalty=1.0).tolist() == [1.0, 1.0]
    assert penalise_missing_eos(scores, ended, penalty=1.0, mode="replace").tolist() == [1.0, -1.0]
    with pytest.raises(ValueError, match="penalty is -1"):
        penalise_missing_eos(scores, ended, penalty=-1)


def test_clip_scores():
    scores = torch.tensor([-7.0, 0.5, 9.0])
    assert clip_scores(scores, 5.0).tolist() == [-5.0, 0.5, 5.0]
    assert clip_scores(scores, None) is scores
    with pytest.raises(ValueError, match="limit is 0"):
        clip_scores(scores, 0)


def test_whitened_rewards_keep_their_mean():
    rewards, mask = torch.randn(4, 4) + 3, torch.rand(4, 4) > 0.2
    whitened = whiten_rewards(rewards, mask)
    torch.testing.assert_close(whitened[mask].mean(), rewards[mask].mean())
    torch.testing.assert_close(whitened[mask].var(unbiased=False), torch.tensor(1.0), atol=1e-4, rtol=0)
