"""The importance weight of each token, and metrics that tell arithmetic from staleness."""

import math

import numpy as np
import pytest
import torch

from steersman.trainer.rollout.types import FinishReason, Prompt, Rollout, VersionSpan, WeightVersion
from steersman.trainer.stages.ppo_batch import RolloutTensors, importance_weights

STEP = 5
CAP = 1.5
Tokens = list[tuple[int, float, float]]
# Of each token: the step of the weights that drew it, their log-prob of it, and the trainer's.
TOKENS: list[Tokens] = [
    [(3, -1.0, -0.2), (3, -2.0, -2.5), (4, -1.0, -1.1), (5, -0.5, -0.500001)],
    [(5, -0.7, -0.70001)],
    [(4, -3.0, -2.0), (5, -1.0, -1.0)],
]


def rollout(index: int, tokens: Tokens) -> Rollout:
    steps = [step for step, _, _ in tokens]
    spans = [
        VersionSpan(
            version=WeightVersion(run_id="demo.1", step=step),
            start=steps.index(step),
            end=steps.index(step) + steps.count(step),
        )
        for step in sorted(set(steps))
    ]
    return Rollout(
        prompt=Prompt(index=index, token_ids=np.array([1], np.int32)),
        sample=0,
        response_ids=np.ones(len(tokens), np.int32),
        behaviour_logprobs=np.array([behaviour for _, behaviour, _ in tokens], np.float32),
        ref_logprobs=np.zeros(len(tokens), np.float32),
        weight_versions=tuple(spans),
        score=0.0,
        finish_reason=FinishReason.STOP,
    )


def measured(cap: float | None = CAP, tokens: list[Tokens] = TOKENS) -> tuple[torch.Tensor, dict[str, float]]:
    rollouts = [rollout(index, row) for index, row in enumerate(tokens)]
    data = RolloutTensors.of(rollouts, torch.device("cpu"), step=STEP)
    old_BT = torch.zeros_like(data.ref_BT)
    for row, drawn in enumerate(tokens):
        old_BT[row, : len(drawn)] = torch.tensor([old for _, _, old in drawn])
    return importance_weights(data, old_BT, cap=cap)


def test_each_token_is_weighed_against_the_weights_that_drew_it() -> None:
    weights_BT, _ = measured()
    for row, tokens in enumerate(TOKENS):
        expected = [min(math.exp(old - behaviour), CAP) for _, behaviour, old in tokens]
        assert weights_BT[row, : len(tokens)].tolist() == pytest.approx(expected, rel=1e-6)
        assert weights_BT[row, len(tokens) :].tolist() == [1.0] * (4 - len(tokens))
    assert measured(cap=None)[0].unique().tolist() == [1.0]


def test_the_metrics_of_an_age_are_over_its_tokens_alone() -> None:
    _, metrics = measured()
    flat = [(STEP - step, old - behaviour) for tokens in TOKENS for step, behaviour, old in tokens]
    groups = {"": flat, "_on_policy": flat[4:5]}  # only the second response has one age, and that is 0
    groups |= {f"_age_{age}": [token for token in flat if token[0] == age] for age in range(3)}
    for suffix, tokens in groups.items():
        differences = [difference for _, difference in tokens]
        ratios = [math.exp(difference) for difference in differences]
        expected = {
            "mismatch/logprob_abs_mean": sum(map(abs, differences)) / len(differences),
            "mismatch/logprob_abs_max": max(map(abs, differences)),
            "mismatch/ratio_mean": sum(ratios) / len(ratios),
            "mismatch/kl": sum(ratio - 1 - math.log(ratio) for ratio in ratios) / len(ratios),
            "tis/capped_share": sum(ratio > CAP for ratio in ratios) / len(ratios),
        }
        for name, value in expected.items():
            assert metrics[name + suffix] == pytest.approx(value, rel=1e-5, abs=1e-7), name + suffix
    assert "mismatch/kl_age_3" not in metrics
    _, metrics = measured(tokens=TOKENS[:1])
    assert "mismatch/kl_on_policy" not in metrics


def test_the_shares_of_the_ages() -> None:
    _, metrics = measured()
    assert metrics["rollout/staleness_max"] == 2.0
    assert metrics["rollout/staleness_mean"] == pytest.approx((2 * 2 + 2 * 1 + 3 * 0) / 7)
    assert metrics["rollout/stale_token_share"] == pytest.approx(4 / 7)
    assert [metrics[f"rollout/token_share_age_{age}"] for age in range(3)] == pytest.approx([3 / 7, 2 / 7, 2 / 7])
    weights = [min(math.exp(old - behaviour), CAP) for tokens in TOKENS for _, behaviour, old in tokens]
    effective = sum(weights) ** 2 / sum(weight**2 for weight in weights) / len(weights)
    assert metrics["tis/effective_share"] == pytest.approx(effective, rel=1e-5)
