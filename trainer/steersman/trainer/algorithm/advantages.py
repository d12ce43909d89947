"""Advantage estimators: GAE with a critic; group-relative and leave-one-out without one; and whitening."""

import torch
from torch import Tensor

from steersman.trainer.algorithm.metrics import masked_mean, masked_var


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns they imply, ``[B, T]`` float32 each, zero where masked.

    ``delta_t = r_t + gamma * V_{t+1} - V_t`` and ``A_t = delta_t + gamma * lam * A_{t+1}``, where ``t + 1``
    is the next *counted* token: a masked token (padding, or a token that the policy did not write) is passed
    over as if it were not there. After the last counted token the value is zero: a response ends its episode.
    ``returns = advantages + values``.

    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    arXiv 1506.02438, equations 11 and 16. ValueError if ``gamma`` or ``lam`` lies outside [0, 1] or the
    shapes differ.
    """
    _require_unit_interval("gamma", gamma)
    _require_unit_interval("lam", lam)
    _require_same_shape(rewards_BT=rewards_BT, values_BT=values_BT, mask_BT=mask_BT)
    with torch.no_grad():
        # Time first: every step then reads and writes contiguous rows.
        mask_TB = mask_BT.bool().T.contiguous()
        zero = torch.zeros((), dtype=torch.float32, device=rewards_BT.device)
        rewards_TB = torch.where(mask_TB, rewards_BT.float().T, zero)
        values_TB = torch.where(mask_TB, values_BT.float().T, zero)
        advantages_TB = torch.zeros_like(values_TB)
        next_value_B = torch.zeros_like(values_TB[0]) if len(values_TB) else zero
        next_advantage_B = next_value_B
        for t in range(len(values_TB) - 1, -1, -1):
            delta_B = rewards_TB[t] + gamma * next_value_B - values_TB[t]
            advantage_B = delta_B + gamma * lam * next_advantage_B
            next_advantage_B = torch.where(mask_TB[t], advantage_B, next_advantage_B)
            next_value_B = torch.where(mask_TB[t], values_TB[t], next_value_B)
            advantages_TB[t] = next_advantage_B
        advantages_TB = torch.where(mask_TB, advantages_TB, zero)
        return advantages_TB.T.contiguous(), (advantages_TB + values_TB).T.contiguous()


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    epsilon: float = 1e-8,
) -> Tensor:
    """``x`` with unit variance over its counted entries and, if ``shift_mean``, zero mean; zero where masked.

    Give ``mean`` and ``var`` (scalars) when ``x`` is only a share of the batch, as with data parallelism: the
    moments must be those of the whole batch. Without ``shift_mean`` the mean stays what it was (rewards keep
    their sign). Population variance, as in the original code of Ziegler et al., arXiv 1909.08593. Shape
    ``[...]``.
    """
    mean = masked_mean(x, mask) if mean is None else mean
    var = masked_var(x, mask) if var is None else var
    whitened = (x - mean) * torch.rsqrt(var + epsilon)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened))


def group_relative(
    scores_NG: Tensor, mask_NG: Tensor | None = None, *, scale_by_std: bool = True, epsilon: float = 1e-6
) -> Tensor:
    """GRPO's advantage ``[N, G]`` of each sample over its group: ``(score - mean) / (std + epsilon)``.

    ``scale_by_std=False`` leaves the division out (Liu et al., "Dr. GRPO", arXiv 2503.20783: the division favours
    prompts that are nearly solved or nearly hopeless). A sample that has no score is masked out and moves no mean; its
    advantage is zero. The standard deviation is the unbiased one, zero for a group of one.
    Source: Shao et al., arXiv 2402.03300, section 4.1.2.
    """
    mask_NG, scores_NG, count_N1 = _group(scores_NG, mask_NG)
    mean_N1 = scores_NG.sum(1, keepdim=True) / count_N1.clamp(min=1)
    centred_NG = torch.where(mask_NG, scores_NG - mean_N1, torch.zeros_like(scores_NG))
    if not scale_by_std:
        return centred_NG
    var_N1 = centred_NG.square().sum(1, keepdim=True) / (count_N1 - 1).clamp(min=1)
    return centred_NG / (var_N1.sqrt() + epsilon)


def leave_one_out(scores_NG: Tensor, mask_NG: Tensor | None = None) -> Tensor:
    """RLOO's advantage ``[N, G]``: a sample's score less the mean score of the *other* samples of its prompt.

    Zero where masked and in a group with one counted sample, which has no others to compare with.
    Source: Ahmadian et al., "Back to Basics", arXiv 2402.14740, equation 6.
    """
    mask_NG, scores_NG, count_N1 = _group(scores_NG, mask_NG)
    others_NG = (scores_NG.sum(1, keepdim=True) - scores_NG) / (count_N1 - 1).clamp(min=1)
    comparable_NG = mask_NG & (count_N1 > 1)
    return torch.where(comparable_NG, scores_NG - others_NG, torch.zeros_like(scores_NG))


def _group(scores_NG: Tensor, mask_NG: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if mask_NG is None:
        mask_NG = torch.ones_like(scores_NG, dtype=torch.bool)
    _require_same_shape(scores_NG=scores_NG, mask_NG=mask_NG)
    scores_NG = torch.where(mask_NG, scores_NG.float(), torch.zeros((), device=scores_NG.device))
    return mask_NG, scores_NG, mask_NG.sum(1, keepdim=True)


def _require_unit_interval(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value}, must be in [0, 1]")


def _require_same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes must be alike, got {', '.join(f'{k} {v}' for k, v in shapes.items())}")
