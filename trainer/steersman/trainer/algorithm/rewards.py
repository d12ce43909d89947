"""From the reward model's score of a response to the reward of each of its tokens."""

from typing import Literal

import torch
from torch import Tensor

from steersman.trainer.algorithm.advantages import whiten


def penalise_missing_eos(
    scores_B: Tensor, ended_B: Tensor, *, penalty: float, mode: Literal["subtract", "replace"] = "subtract"
) -> Tensor:
    """Scores in which a response that ran into the limit (``ended_B`` is false) is worth less.

    ``subtract`` takes ``penalty`` off the score; ``replace`` gives ``-penalty`` in its place, since the
    reward model never saw an unfinished response. ``[B]``. Source: Huang et al., "The N+ Implementation
    Details of RLHF with PPO", arXiv 2403.17031, detail "EOS trick" (replace, with -1). ValueError for a
    negative penalty.
    """
    if penalty < 0:
        raise ValueError(f"penalty is {penalty}, must be at least 0")
    if mode not in ("subtract", "replace"):
        raise ValueError(f"mode is {mode!r}, must be 'subtract' or 'replace'")
    poor_B = scores_B - penalty if mode == "subtract" else torch.full_like(scores_B, -penalty)
    return torch.where(ended_B, scores_B, poor_B)


def clip_scores(scores_B: Tensor, limit: float | None) -> Tensor:
    """Scores held within ``[-limit, limit]``; unchanged when ``limit`` is None. ValueError unless ``limit``
    is positive.
    """
    if limit is None:
        return scores_B
    if limit <= 0:
        raise ValueError(f"limit is {limit}, must be above 0")
    return scores_B.clamp(-limit, limit)


def token_rewards(kl_BT: Tensor, scores_B: Tensor, mask_BT: Tensor, *, kl_coef: float) -> Tensor:
    """Rewards ``[B, T]`` in float32: ``-kl_coef * kl`` at counted tokens, plus the score at the last of them.

    Zero where masked. ``kl_BT`` is the per-token estimate (k1 in the original). A row without a counted token
    keeps no reward. Source: Ouyang et al. (InstructGPT), arXiv 2203.02155, equation 2; Ziegler et al., arXiv
    1909.08593, equation 2. ValueError if ``kl_coef`` is negative.
    """
    if kl_coef < 0:
        raise ValueError(f"kl_coef is {kl_coef}, must be at least 0")
    rewards_BT = torch.where(mask_BT, -kl_coef * kl_BT.float(), torch.zeros((), device=kl_BT.device))
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = torch.where(mask_BT, positions_T, -1).amax(dim=1)
    at_last_BT = (positions_T == last_B[:, None]) & mask_BT
    return torch.where(at_last_BT, rewards_BT + scores_B.float()[:, None], rewards_BT)


def whiten_rewards(rewards_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Rewards with unit variance over the batch's counted tokens; their mean stays, so that good stays good.

    Source: arXiv 2403.17031, detail "reward whitening" (``shift_mean=False``).
    """
    return whiten(rewards_BT, mask_BT, shift_mean=False)
