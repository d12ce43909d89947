import math

import pytest
import torch

from steersman.trainer.algorithm.kl import AdaptiveKLController, FixedKLController, kl_estimate


def test_estimators_equal_their_definitions():
    log_p, log_q = [-0.5, -1.0, -3.0], [-0.7, -1.0, -0.1]
    ratios = [math.exp(q - p) for p, q in zip(log_p, log_q, strict=True)]
    expected = {
        "k1": [-math.log(r) for r in ratios],
        "k2": [math.log(r) ** 2 / 2 for r in ratios],
        "k3": [(r - 1) - math.log(r) for r in ratios],
    }
    for name, values in expected.items():
        got = kl_estimate(torch.tensor(log_p), torch.tensor(log_q), name)
        torch.testing.assert_close(got, torch.tensor(values), atol=1e-5, rtol=1e-5)


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative():
    p = torch.softmax(torch.tensor([0.3, -0.2, 1.0, 0.1], dtype=torch.float64), 0)
    q = torch.softmax(torch.tensor([0.1, 0.4, 0.6, -0.5], dtype=torch.float64), 0)
    exact = (p * (p / q).log()).sum()
    for name in ("k1", "k3"):
        # The expectation under p is exact: a sum over the whole vocabulary instead of samples.
        torch.testing.assert_close((p * kl_estimate(p.log(), q.log(), name)).sum(), exact)
    assert (kl_estimate(p.log(), q.log(), "k3") >= 0).all()


def test_on_policy_gradient_of_k2_is_that_of_the_reverse_kl_and_of_k1_is_zero():
    logits = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    q = torch.softmax(torch.tensor([0.1, 0.4, 0.6], dtype=torch.float64), 0)
    log_p = torch.log_softmax(logits, 0)
    exact = torch.autograd.grad((log_p.exp() * (log_p - q.log())).sum(), logits, retain_graph=True)[0]
    sampled = log_p.exp().detach()
    k2 = torch.autograd.grad((sampled * kl_estimate(log_p, q.log(), "k2")).sum(), logits, retain_graph=True)[0]
    k1 = torch.autograd.grad((sampled * kl_estimate(log_p, q.log(), "k1")).sum(), logits)[0]
    torch.testing.assert_close(k2, exact)
    torch.testing.assert_close(k1, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="estimator is 'k4'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_adaptive_controller_follows_the_formula_and_clips_the_error():
    controller = AdaptiveKLController(coefficient=0.2, target=6.0, horizon=10_000)
    controller.update(6.6, num_samples=500)  # 10 % over the target
    assert controller.coefficient == pytest.approx(0.2 * (1 + 0.1 * 500 / 10_000))
    before = controller.coefficient
    controller.update(600.0, num_samples=500)
    assert controller.coefficient == pytest.approx(before * (1 + 0.2 * 500 / 10_000))
    controller.update(0.0, num_samples=10**9)
    assert controller.coefficient > 0


def test_adaptive_controller_brings_a_simulated_policy_to_its_target():
    controller = AdaptiveKLController(coefficient=1.0, target=4.0, horizon=1_000)
    kl = 0.0
    for _ in range(400):
        kl = 1.0 / controller.coefficient  # a policy that drifts the further the less it is held
        controller.update(kl, num_samples=100)
    assert kl == pytest.approx(4.0, rel=0.01)


def test_controllers_resume():
    controller = AdaptiveKLController(coefficient=0.1, target=1.0)
    controller.update(3.0, 100)
    resumed = AdaptiveKLController(coefficient=0.1, target=1.0)
    resumed.load_state_dict(controller.state_dict())
    assert resumed == controller
    fixed = FixedKLController(coefficient=0.3)
    fixed.update(100.0, 100)
    assert fixed.coefficient == 0.3


@pytest.mark.parametrize("bad", [{"coefficient": 0.0}, {"target": 0.0}, {"horizon": 0}])
def test_settings_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdaptiveKLController(**{"coefficient": 0.1, "target": 1.0, **bad})
