import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from steersman.trainer.algorithm.logprobs import logprobs_from_hidden, logprobs_from_logits, most_likely_tokens

TOKENS, VOCABULARY, WIDTH = 23, 31, 8


def slow_logprob_and_entropy(logits: list[float], target: int, temperature: float) -> tuple[float, float]:
    scaled = [z / temperature for z in logits]
    log_normaliser = math.log(sum(math.exp(z) for z in scaled))
    logprobs = [z - log_normaliser for z in scaled]
    return logprobs[target], -sum(math.exp(lp) * lp for lp in logprobs)


def plain(hidden, head, bias, targets, temperature):
    log_p = torch.log_softmax((hidden @ head.T + bias) / temperature, dim=-1)
    return log_p.gather(-1, targets[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, requires_grad=True)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator, requires_grad=True)
    bias = torch.randn(VOCABULARY, generator=generator, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return hidden, head, bias, targets


def test_both_forms_agree_with_the_slow_reference(problem):
    hidden, head, bias, targets = problem
    logits = (hidden @ head.T + bias).detach()
    expected = [
        slow_logprob_and_entropy(row, target, 0.7)
        for row, target in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    from_hidden = logprobs_from_hidden(hidden, head, targets, bias_V=bias, temperature=0.7, with_entropy=True)
    from_logits = logprobs_from_logits(logits, targets, temperature=0.7, with_entropy=True)
    for result in (from_hidden, from_logits):
        torch.testing.assert_close(result.logprobs, torch.tensor([lp for lp, _ in expected]), atol=1e-5, rtol=0)
        torch.testing.assert_close(result.entropy, torch.tensor([h for _, h in expected]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("keep_bytes", [0, 8 * VOCABULARY * 4, 1 << 20], ids=["none", "some", "all"])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_gradients_do_not_depend_on_the_chunks(problem, chunk_tokens, keep_bytes, with_entropy):
    hidden, head, bias, targets = problem
    weight_logprob, weight_entropy = torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(1))

    result = logprobs_from_hidden(
        hidden,
        head,
        targets,
        bias_V=bias,
        temperature=1.3,
        with_entropy=with_entropy,
        chunk_bytes=chunk_tokens * VOCABULARY * 4,
        keep_bytes=keep_bytes,
    )
    logprobs, entropy = plain(hidden, head, bias, targets, 1.3)
    objective, expected = (result.logprobs * weight_logprob).sum(), (logprobs * weight_logprob).sum()
    if with_entropy:
        objective = objective + (result.entropy * weight_entropy).sum()
        expected = expected + (entropy * weight_entropy).sum()

    for got, want in zip(
        torch.autograd.grad(objective, (hidden, head, bias)),
        torch.autograd.grad(expected, (hidden, head, bias)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_gradient_of_logits_matches_plain_autograd(problem):
    hidden, head, bias, targets = problem
    logits = (hidden @ head.T + bias).detach().requires_grad_()
    result = logprobs_from_logits(logits, targets, temperature=0.5, with_entropy=True, chunk_bytes=3 * VOCABULARY * 4)
    log_p = torch.log_softmax(logits / 0.5, dim=-1)
    expected = log_p.gather(-1, targets[:, None]).sum() - 2 * (log_p.exp() * log_p).sum()
    got = torch.autograd.grad(result.logprobs.sum() + 2 * result.entropy.sum(), logits)[0]
    torch.testing.assert_close(got, torch.autograd.grad(expected, logits)[0], atol=1e-5, rtol=1e-4)


def test_keeps_leading_shape_and_leaves_entropy_out_unless_asked(problem):
    hidden, head, _, targets = problem
    result = logprobs_from_hidden(hidden[:22].reshape(2, 11, WIDTH), head, targets[:22].reshape(2, 11))
    assert result.logprobs.shape == (2, 11)
    assert result.entropy is None
    result.logprobs.sum().backward()
    assert hidden.grad[:22].abs().sum() > 0
    assert hidden.grad[22].abs().sum() == 0


def test_most_likely_tokens_do_not_depend_on_the_chunks(problem):
    hidden, head, bias, _ = problem
    got = most_likely_tokens(hidden, head, bias_V=bias, chunk_bytes=3 * VOCABULARY * 4)
    assert torch.equal(got, (hidden @ head.T + bias).argmax(-1))


def test_a_forbidden_token_makes_no_nan():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    result = logprobs_from_logits(logits, torch.tensor([1]), with_entropy=True)
    (result.logprobs.sum() + result.entropy.sum()).backward()
    assert torch.isfinite(result.entropy).all()
    assert torch.isfinite(logits.grad).all()


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation under it returned."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_bytes = max(self.num_bytes, result.nbytes)
        return result


@pytest.mark.parametrize("with_entropy", [False, True])
def test_no_float32_logits_of_the_whole_batch_are_allocated(with_entropy):
    hidden = torch.randn(512, 8, requires_grad=True)
    head = torch.randn(2048, 8, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.long)
    chunk_bytes = 512 * 2048 * 4 // 16
    with LargestTensor() as largest:
        result = logprobs_from_hidden(
            hidden, head, targets, with_entropy=with_entropy, chunk_bytes=chunk_bytes, keep_bytes=0
        )
        result.logprobs.sum().backward()
    assert largest.num_bytes == chunk_bytes


def test_a_second_backward_fails_loudly_because_kept_probabilities_are_used_up(problem):
    hidden, head, _, targets = problem
    total = logprobs_from_hidden(hidden, head, targets).logprobs.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        total.backward()


def test_autocast_takes_the_matrix_product_to_bfloat16(problem):
    hidden, head, _, targets = problem
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = logprobs_from_hidden(hidden, head, targets)
    exact = logprobs_from_hidden(hidden, head, targets)
    assert result.logprobs.dtype == torch.float32
    assert 0 < (result.logprobs - exact.logprobs).abs().max() < 0.2
    result.logprobs.sum().backward()
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(problem, temperature):
    hidden, head, _, targets = problem
    with pytest.raises(ValueError, match="temperature is"):
        logprobs_from_hidden(hidden, head, targets, temperature=temperature)


def test_shapes_that_do_not_fit_are_named(problem):
    hidden, head, _, targets = problem
    with pytest.raises(ValueError, match="hidden has shape"):
        logprobs_from_hidden(hidden, head, targets[:-1])
    with pytest.raises(ValueError, match="logits have shape"):
        logprobs_from_logits(hidden, targets[:-1])
