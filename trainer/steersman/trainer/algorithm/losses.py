"""The losses of the three stages.

Every loss is ``sum over counted items / denominator``. The caller gives the denominator of the *whole* batch,
over all micro-batches and ranks; then the gradients of the parts add up to the gradient of the whole. Metrics
come back as detached sums (see :mod:`steersman.trainer.algorithm`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from steersman.trainer.algorithm.kl import KLEstimator, kl_estimate
from steersman.trainer.algorithm.metrics import masked_sum


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """``loss`` is a differentiable scalar; ``sums`` are detached sums over ``count`` items."""

    loss: Tensor
    sums: dict[str, Tensor]
    count: Tensor


def token_nll_loss(logprobs: Tensor, mask: Tensor, *, denominator: float | Tensor) -> LossOutput:
    """Negative log-likelihood of the counted tokens over ``denominator`` (fine-tuning). Shape ``[...]``."""
    nll = -masked_sum(logprobs, mask)
    return LossOutput(loss=nll / denominator, sums={"nll": nll.detach()}, count=mask.sum())


def truncated_importance_weights(
    old_logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor, *, cap: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights ``min(pi_old / pi_behaviour, cap)`` of each token, and the sums that measure the mismatch.

    The engine that sampled and the trainer that recomputes disagree slightly on the same weights, and fully
    when the sample is older than the weights; the weight corrects for it, the cap bounds the variance. With
    ``cap=None`` the weights are one: measured, not corrected. Constants in the gradient; one where masked.
    ``[...]``, float32.

    Sums: ``behaviour/ratio``, ``behaviour/abs_diff``, ``behaviour/kl`` (k3 of behaviour from old),
    ``behaviour/capfrac``. Source: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training", 2025 (TIS); Ionides, 2008.
    """
    if cap is not None and cap <= 0:
        raise ValueError(f"cap is {cap}, must be above 0")
    with torch.no_grad():
        log_ratio = _masked(old_logprobs.float() - behaviour_logprobs.float(), mask)
        ratio = log_ratio.exp()
        capped = ratio > (cap if cap is not None else torch.inf)
        sums = {
            "behaviour/ratio": masked_sum(ratio, mask),
            "behaviour/abs_diff": masked_sum(log_ratio.abs(), mask),
            "behaviour/kl": masked_sum(log_ratio.expm1() - log_ratio, mask),
            "behaviour/capfrac": masked_sum(capped.float(), mask),
        }
        weights = torch.ones_like(ratio) if cap is None else ratio.clamp(max=cap)
        return weights, sums


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    denominator: float | Tensor,
    weights: Tensor | None = None,
) -> LossOutput:
    """PPO's clipped surrogate: ``max(-A * r, -A * clip(r, 1 - clip_low, 1 + clip_high))``, ``r = pi / pi_old``.

    ``clip_high`` defaults to ``clip_low`` (a wider one is the "clip-higher" of DAPO, arXiv 2503.14476).
    ``weights`` are per-token importance weights (:func:`truncated_importance_weights`). All shapes ``[...]``
    alike; only ``logprobs`` is differentiated. Source: Schulman et al., arXiv 1707.06347, equation 7.

    Sums over tokens: ``policy/loss``, ``policy/approxkl`` (k3 of old from new), ``policy/clipfrac``,
    ``policy/ratio``.
    """
    clip_high = clip_low if clip_high is None else clip_high
    if not 0 < clip_low < 1:
        raise ValueError(f"clip_low is {clip_low}, must be in (0, 1)")
    if clip_high <= 0:
        raise ValueError(f"clip_high is {clip_high}, must be above 0")
    # Masked entries may hold anything; they are zeroed before exp so that no infinity reaches the gradient.
    log_ratio = _masked(logprobs - old_logprobs, mask)
    advantages = _masked(advantages, mask)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = torch.maximum(plain, clipped)
    if weights is not None:
        per_token = per_token * weights
    total = masked_sum(per_token, mask)
    with torch.no_grad():
        sums = {
            "policy/loss": total.detach(),
            "policy/approxkl": masked_sum((-log_ratio).expm1() + log_ratio, mask),
            "policy/clipfrac": masked_sum((clipped > plain).float(), mask),
            "policy/ratio": masked_sum(ratio, mask),
        }
    return LossOutput(loss=total / denominator, sums=sums, count=mask.sum())


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float | None = 0.2,
    denominator: float | Tensor,
) -> LossOutput:
    """Half the squared error of the critic, the worse of plain and clipped; shapes ``[...]`` alike.

    The clipped prediction stays within ``clip_range`` of the old one; None takes the plain squared error.
    Source: the PPO code of Dhariwal et al. (OpenAI baselines), kept by Ziegler et al.; arXiv 2403.17031.
    Sums over tokens: ``value/loss``, ``value/clipfrac``, ``value/error`` (mean of ``values - returns``).
    """
    if clip_range is not None and clip_range <= 0:
        raise ValueError(f"clip_range is {clip_range}, must be above 0 or None")
    values = _masked(values.float(), mask)
    old_values = _masked(old_values.float(), mask)
    returns = _masked(returns.float(), mask)
    plain = (values - returns).square()
    if clip_range is None:
        worse = plain
        clipped_more = torch.zeros_like(plain)
    else:
        near = torch.minimum(torch.maximum(values, old_values - clip_range), old_values + clip_range)
        clipped = (near - returns).square()
        worse = torch.maximum(plain, clipped)
        clipped_more = (clipped > plain).float()
    total = 0.5 * masked_sum(worse, mask)
    sums = {
        "value/loss": total.detach(),
        "value/clipfrac": masked_sum(clipped_more, mask),
        "value/error": masked_sum((values - returns).detach(), mask),
    }
    return LossOutput(loss=total / denominator, sums=sums, count=mask.sum())


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    estimator: KLEstimator = "k2",
    denominator: float | Tensor,
    weights: Tensor | None = None,
) -> LossOutput:
    """KL to the reference as a term of the loss (in place of the reward), ``[...]``; sums: ``policy/kl_loss``.

    The gradient of ``k2`` is, on policy, that of the reverse KL; ``k3`` is GRPO's choice (arXiv 2402.03300),
    whose gradient is that of the forward KL. The gradient of ``k1`` is zero in expectation whatever the
    reference, so ``k1`` is refused.
    """
    if estimator == "k1":
        raise ValueError("estimator is 'k1', must be 'k2' or 'k3' in a loss: the expected gradient of k1 is zero")
    # Zeroed per operand: a difference of two masked infinities would be NaN before any mask could help.
    per_token = kl_estimate(_masked(logprobs, mask), _masked(ref_logprobs, mask), estimator)
    if weights is not None:
        per_token = per_token * weights
    total = masked_sum(per_token, mask)
    return LossOutput(loss=total / denominator, sums={"policy/kl_loss": total.detach()}, count=mask.sum())


@dataclass(frozen=True, kw_only=True)
class RankedPairs:
    """Row numbers ``better_P`` and ``worse_P``, ``tie_P``, and ``weight_P``: one over the pairs of its comparison."""

    better_P: Tensor  # noqa: N815
    worse_P: Tensor  # noqa: N815
    tie_P: Tensor  # noqa: N815
    weight_P: Tensor  # noqa: N815


def ranked_pairs(ranks_B: Tensor, comparison_B: Tensor, *, include_ties: bool = False) -> RankedPairs:
    """All pairs of responses of the same comparison, the lower rank (1 is best) as the better one.

    ``ranks_B`` and ``comparison_B`` (the number of the comparison that each response belongs to) are ``[B]``.
    Equal ranks make a pair only with ``include_ties``. ``K`` responses without ties give ``K (K - 1) / 2``
    pairs of weight ``2 / (K (K - 1))``: a comparison counts once however long its list, as in InstructGPT,
    arXiv 2203.02155, equation 1.
    """
    same_BB = comparison_B[:, None] == comparison_B[None, :]
    better_BB = same_BB & (ranks_B[:, None] < ranks_B[None, :])
    ties_BB = same_BB & (ranks_B[:, None] == ranks_B[None, :])
    ties_BB = torch.triu(ties_BB, diagonal=1) & include_ties
    better_P, worse_P = (better_BB | ties_BB).nonzero(as_tuple=True)
    size = int(comparison_B.max()) + 1 if len(comparison_B) else 0
    pairs_of = torch.bincount(comparison_B[better_P], minlength=size)
    return RankedPairs(
        better_P=better_P,
        worse_P=worse_P,
        tie_P=ties_BB[better_P, worse_P],
        weight_P=1.0 / pairs_of[comparison_B[better_P]].float(),
    )


def bradley_terry_loss(
    better_P: Tensor,
    worse_P: Tensor,
    *,
    denominator: float | Tensor,
    weight_P: Tensor | None = None,
    margin_P: Tensor | None = None,
    tie_P: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Negative log-likelihood of choices: ``-log sigmoid(better - worse - margin)``, weighted, over ``denominator``.

    Scores are ``[P]``, one pair each. ``margin_P`` asks for a larger gap (Llama 2, arXiv 2307.09288, equation
    2); ``label_smoothing`` is the chance in [0, 0.5) that the annotator erred; a pair of ``tie_P`` has target
    1/2 and no margin. With ``weight_P`` of :func:`ranked_pairs` the denominator is the number of comparisons.
    Source: Bradley and Terry, 1952; Stiennon et al., arXiv 2009.01325.

    Sums (weighted; ``count`` is the sum of the weights): ``loss``, and over pairs that are not ties
    ``accuracy`` (an equal score counts one half) and ``reward_gap``.
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, must be in [0, 0.5)")
    gap_P = better_P.float() - worse_P.float()
    weight_P = torch.ones_like(gap_P) if weight_P is None else weight_P
    tie_P = torch.zeros_like(gap_P, dtype=torch.bool) if tie_P is None else tie_P
    target_P = torch.where(tie_P, 0.5, 1.0 - label_smoothing)
    logit_P = gap_P if margin_P is None else gap_P - torch.where(tie_P, 0.0, margin_P)
    nll_P = -target_P * F.logsigmoid(logit_P) - (1.0 - target_P) * F.logsigmoid(-logit_P)
    total = (nll_P * weight_P).sum()
    with torch.no_grad():
        correct_P = (gap_P > 0).float() + 0.5 * (gap_P == 0).float()
        sums = {
            "loss": total.detach(),
            "accuracy": masked_sum(correct_P * weight_P, ~tie_P),
            "reward_gap": masked_sum(gap_P * weight_P, ~tie_P),
        }
    return LossOutput(loss=total / denominator, sums=sums, count=weight_P.sum())


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, torch.zeros_like(x))
