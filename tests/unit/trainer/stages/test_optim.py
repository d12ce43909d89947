import math

import pytest
import torch

from steersman.trainer.stages.optim import apply_update, build_optimizer, learning_rate_at
from steersman.trainer.stages.settings import OptimizerConfig


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.55, 0.1]),
        ("cosine", [0.5, 1.0, 1.0, 0.55, 0.1]),
    ],
)
def test_warm_up_and_schedule(schedule, expected):
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=2, final_share=0.1)
    assert [learning_rate_at(config, step, 5) for step in range(5)] == pytest.approx(expected)


def test_cosine_is_a_cosine_between():
    config = OptimizerConfig(learning_rate=2.0, schedule="cosine")
    assert learning_rate_at(config, 25, 101) == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate_at(config, 500, 101) == 0.0


def test_only_matrices_decay_and_each_parameter_is_there_once():
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.5), model, model)
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(1, 0.5), (1, 0.0)]


@pytest.mark.parametrize("limit", [None, 1.0, 100.0])
def test_update_equals_torch_with_clipping(limit):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        (model(torch.ones(2, 4)).square().sum() * 3).backward()
        return model

    ours, theirs = make(), make()
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", max_grad_norm=limit)
    result = apply_update(build_optimizer(config, ours), config, step=0, total_steps=9)
    expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit or math.inf)
    torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.0, foreach=False, fused=False).step()
    assert result == {"lr": 0.1, "grad_norm": pytest.approx(float(expected_norm), rel=1e-5)}
    torch.testing.assert_close(ours.weight, theirs.weight)
    assert ours.weight.grad is None


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = torch.nn.Linear(2, 1)
    before = model.weight.clone()
    model.weight.grad = torch.full_like(model.weight, torch.nan)
    config = OptimizerConfig()
    with pytest.raises(FloatingPointError, match="gradient norm is nan at step 3"):
        apply_update(build_optimizer(config, model), config, step=3, total_steps=9)
    assert torch.equal(model.weight, before)
