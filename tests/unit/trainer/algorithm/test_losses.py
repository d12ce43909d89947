import itertools
import math

import pytest
import torch

from steersman.trainer.algorithm.losses import (
    bradley_terry_loss,
    kl_loss,
    policy_loss,
    ranked_pairs,
    token_nll_loss,
    truncated_importance_weights,
    value_loss,
)


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(4, 6, generator=generator) > 0.3
    draw = torch.randn(5, 4, 6, generator=generator)
    return mask, draw


def counted(mask, *tensors):
    return zip(*(t[mask].tolist() for t in tensors), strict=True)


def test_policy_loss_equals_the_slow_form(tokens):
    mask, (new, old, advantages, weights, _) = tokens
    weights = weights.abs()
    got = policy_loss(new, old, advantages, mask, clip_low=0.2, clip_high=0.3, denominator=7.0, weights=weights)
    total = kl = clipped = ratios = 0.0
    for n, o, a, w in counted(mask, new, old, advantages, weights):
        ratio = math.exp(n - o)
        bounded = min(max(ratio, 0.8), 1.3)
        total += w * max(-a * ratio, -a * bounded)
        kl += math.exp(o - n) - 1 - (o - n)
        clipped += -a * bounded > -a * ratio
        ratios += ratio
    assert float(got.loss) == pytest.approx(total / 7.0, rel=1e-5)
    assert float(got.sums["policy/loss"]) == pytest.approx(total, rel=1e-5)
    assert float(got.sums["policy/approxkl"]) == pytest.approx(kl, rel=1e-5)
    assert float(got.sums["policy/clipfrac"]) == clipped
    assert float(got.sums["policy/ratio"]) == pytest.approx(ratios, rel=1e-5)
    assert int(got.count) == int(mask.sum())


def test_at_the_old_policy_the_gradient_is_the_policy_gradient(tokens):
    mask, (old, _, advantages, *_) = tokens
    new = old.clone().requires_grad_()
    policy_loss(new, old, advantages, mask, denominator=1.0).loss.backward()
    torch.testing.assert_close(new.grad, torch.where(mask, -advantages, 0.0))


def test_beyond_the_clip_a_good_token_gives_no_gradient():
    new = torch.tensor([math.log(1.5), math.log(0.5)], requires_grad=True)
    policy_loss(new, torch.zeros(2), torch.tensor([1.0, -1.0]), torch.ones(2).bool(), denominator=1.0).loss.backward()
    assert new.grad.tolist() == [0.0, 0.0]


def test_value_loss_equals_the_slow_form(tokens):
    mask, (values, old, returns, *_) = tokens
    got = value_loss(values, old, returns, mask, clip_range=0.4, denominator=5.0)
    total = clipped = 0.0
    for v, o, r in counted(mask, values, old, returns):
        near = min(max(v, o - 0.4), o + 0.4)
        total += 0.5 * max((v - r) ** 2, (near - r) ** 2)
        clipped += (near - r) ** 2 > (v - r) ** 2
    assert float(got.loss) == pytest.approx(total / 5.0, rel=1e-5)
    assert float(got.sums["value/clipfrac"]) == clipped
    plain = value_loss(values, old, returns, mask, clip_range=None, denominator=1.0)
    assert float(plain.loss) == pytest.approx(
        sum(0.5 * (v - r) ** 2 for v, r in counted(mask, values, returns)), rel=1e-5
    )


def test_truncated_importance_weights_equal_the_slow_form(tokens):
    mask, (old, behaviour, *_) = tokens
    weights, sums = truncated_importance_weights(old, behaviour, mask, cap=1.5)
    for (w,), (o, b) in zip(counted(mask, weights), counted(mask, old, behaviour), strict=True):
        assert w == pytest.approx(min(math.exp(o - b), 1.5), rel=1e-5)
    assert (weights[~mask] == 1).all()
    assert float(sums["behaviour/abs_diff"]) == pytest.approx(
        sum(abs(o - b) for o, b in counted(mask, old, behaviour)), rel=1e-5
    )
    measured_only, same_sums = truncated_importance_weights(old, behaviour, mask, cap=None)
    assert (measured_only == 1).all()
    assert same_sums["behaviour/ratio"] == sums["behaviour/ratio"]
    assert float(same_sums["behaviour/capfrac"]) == 0


@pytest.mark.parametrize("loss", ["policy", "value", "kl", "nll"])
def test_micro_batches_add_up_to_the_whole_gradient(tokens, loss):
    mask, (x, a, b, *_) = tokens

    def run(rows: slice, x: torch.Tensor) -> torch.Tensor:
        denominator = mask.sum()
        if loss == "policy":
            return policy_loss(x[rows], a[rows], b[rows], mask[rows], denominator=denominator).loss
        if loss == "value":
            return value_loss(x[rows], a[rows], b[rows], mask[rows], denominator=denominator).loss
        if loss == "kl":
            return kl_loss(x[rows], a[rows], mask[rows], estimator="k3", denominator=denominator).loss
        return token_nll_loss(x[rows], mask[rows], denominator=denominator).loss

    whole = x.clone().requires_grad_()
    run(slice(0, 4), whole).backward()
    parts = x.clone().requires_grad_()
    for rows in (slice(0, 1), slice(1, 4)):
        run(rows, parts).backward()
    torch.testing.assert_close(parts.grad, whole.grad)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_padding_reaches_neither_loss_nor_gradient(tokens, bad):
    mask, (x, a, b, *_) = tokens
    dirty = [t.masked_fill(~mask, bad) for t in (a, b)]
    losses = (
        lambda x, a, b: policy_loss(x, a, b, mask, denominator=1.0).loss,
        lambda x, a, b: value_loss(x, a, b, mask, denominator=1.0).loss,
        lambda x, a, b: kl_loss(x, a, mask, denominator=1.0).loss,
    )
    for function in losses:
        clean_x, dirty_x = x.clone().requires_grad_(), x.masked_fill(~mask, bad).requires_grad_()
        clean, soiled = function(clean_x, a, b), function(dirty_x, *dirty)
        torch.testing.assert_close(soiled, clean)
        clean.backward()
        soiled.backward()
        torch.testing.assert_close(dirty_x.grad, clean_x.grad)


def test_kl_loss_refuses_k1(tokens):
    mask, (x, a, *_) = tokens
    with pytest.raises(ValueError, match="expected gradient of k1 is zero"):
        kl_loss(x, a, mask, estimator="k1", denominator=1.0)


def slow_ranked_loss(scores: list[list[float]], ranks: list[list[int]]) -> float:
    """InstructGPT's equation 1: the mean over comparisons of the mean over their pairs."""
    total = 0.0
    for row, rank in zip(scores, ranks, strict=True):
        pairs = [(i, j) for i, j in itertools.permutations(range(len(row)), 2) if rank[i] < rank[j]]
        total += sum(math.log(1 + math.exp(-(row[i] - row[j]))) for i, j in pairs) / len(pairs)
    return total / len(scores)


def test_ranked_responses_become_all_their_pairs_and_each_comparison_counts_once():
    scores = [[0.5, -0.3, 1.2, 0.0], [0.1, 0.4]]
    ranks = [[2, 4, 1, 3], [1, 2]]
    flat = torch.tensor([s for row in scores for s in row])
    pairs = ranked_pairs(torch.tensor([r for row in ranks for r in row]), torch.tensor([0] * 4 + [1] * 2))
    assert len(pairs.better_P) == 7
    got = bradley_terry_loss(flat[pairs.better_P], flat[pairs.worse_P], weight_P=pairs.weight_P, denominator=2)
    assert float(got.loss) == pytest.approx(slow_ranked_loss(scores, ranks), rel=1e-5)
    assert float(got.count) == pytest.approx(2.0)


def test_ties_make_pairs_only_when_asked_for():
    ranks, comparison = torch.tensor([1, 1, 2]), torch.zeros(3, dtype=torch.long)
    without = ranked_pairs(ranks, comparison)
    assert list(zip(without.better_P.tolist(), without.worse_P.tolist(), strict=True)) == [(0, 2), (1, 2)]
    with_ties = ranked_pairs(ranks, comparison, include_ties=True)
    assert with_ties.tie_P.tolist() == [True, False, False]
    assert with_ties.weight_P.tolist() == pytest.approx([1 / 3] * 3)


def test_bradley_terry_with_margin_smoothing_and_ties_equals_the_slow_form():
    better, worse, margin = [1.0, 0.2, 0.3], [0.0, 0.5, 0.1], [0.5, 0.0, 9.0]
    tie = [False, False, True]
    got = bradley_terry_loss(
        torch.tensor(better),
        torch.tensor(worse),
        margin_P=torch.tensor(margin),
        tie_P=torch.tensor(tie),
        label_smoothing=0.1,
        denominator=3,
    )

    def nll(logit: float, target: float) -> float:
        p = 1 / (1 + math.exp(-logit))
        return -target * math.log(p) - (1 - target) * math.log(1 - p)

    expected = (nll(0.5, 0.9) + nll(-0.3, 0.9) + nll(0.2, 0.5)) / 3
    assert float(got.loss) == pytest.approx(expected, rel=1e-5)
    assert float(got.sums["accuracy"]) == 1.0


def test_a_tie_pulls_the_scores_together():
    scores = torch.tensor([2.0, -1.0], requires_grad=True)
    bradley_terry_loss(scores[:1], scores[1:], tie_P=torch.tensor([True]), denominator=1).loss.backward()
    assert scores.grad[0] > 0 > scores.grad[1]


def test_extreme_gaps_stay_finite():
    scores = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = bradley_terry_loss(scores[:1], scores[1:], denominator=1).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2e4)
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x, m: policy_loss(x, x, x, m, clip_low=1.0, denominator=1), "clip_low"),
        (lambda x, m: policy_loss(x, x, x, m, clip_high=0.0, denominator=1), "clip_high"),
        (lambda x, m: value_loss(x, x, x, m, clip_range=0.0, denominator=1), "clip_range"),
        (lambda x, m: truncated_importance_weights(x, x, m, cap=0.0), "cap"),
        (lambda x, m: bradley_terry_loss(x, x, label_smoothing=0.5, denominator=1), "label_smoothing"),
    ],
)
def test_settings_out_of_range_are_named(call, name):
    with pytest.raises(ValueError, match=f"{name} is"):
        call(torch.zeros(2), torch.ones(2, dtype=torch.bool))
