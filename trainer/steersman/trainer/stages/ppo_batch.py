"""A batch of rollouts as tensors, and what PPO makes of it before it optimises.

Shape suffixes: `B` samples, `T` response tokens up to the longest of the batch. Response token `t` of row `b`
counts where `mask_BT[b, t]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steersman.trainer.algorithm.advantages import gae, whiten
from steersman.trainer.algorithm.kl import kl_estimate
from steersman.trainer.algorithm.losses import truncated_importance_weights
from steersman.trainer.algorithm.metrics import explained_variance, masked_mean
from steersman.trainer.algorithm.rewards import clip_scores, penalise_missing_eos, token_rewards, whiten_rewards
from steersman.trainer.rollout.types import FinishReason, Rollout
from steersman.trainer.stages.ppo_config import PpoConfig


@dataclass(frozen=True, kw_only=True)
class RolloutTensors:
    """What came over the network. Zero where masked. `ages_BT` are the steps between the weights that drew a token and
    those that are trained on it.
    """

    mask_BT: Tensor  # noqa: N815
    ages_BT: Tensor  # noqa: N815
    behaviour_BT: Tensor  # noqa: N815
    ref_BT: Tensor  # noqa: N815
    scores_B: Tensor  # noqa: N815
    ended_B: Tensor  # noqa: N815

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], device: torch.device, *, step: int) -> "RolloutTensors":
        """The tensors of `rollouts`, row by row, to be trained on at `step`."""
        lengths_B = torch.tensor([len(rollout.response_ids) for rollout in rollouts])
        mask_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]

        def padded(rows: list[np.ndarray]) -> Tensor:
            flat_BT = torch.zeros(mask_BT.shape)
            flat_BT[mask_BT] = torch.from_numpy(np.concatenate(rows).astype(np.float32))
            return flat_BT.to(device)

        return cls(
            mask_BT=mask_BT.to(device),
            ages_BT=padded([step - rollout.token_steps for rollout in rollouts]).int(),
            behaviour_BT=padded([rollout.behaviour_logprobs for rollout in rollouts]),
            ref_BT=padded([rollout.ref_logprobs for rollout in rollouts]),
            scores_B=torch.tensor([rollout.score for rollout in rollouts], dtype=torch.float32, device=device),
            ended_B=torch.tensor([r.finish_reason is FinishReason.STOP for r in rollouts], device=device),
        )


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the losses aim at; constants of the gradient. All `[B, T]`, zero (weights: one) where masked."""

    mask_BT: Tensor  # noqa: N815
    old_BT: Tensor  # noqa: N815
    old_values_BT: Tensor  # noqa: N815
    advantages_BT: Tensor  # noqa: N815
    returns_BT: Tensor  # noqa: N815
    weights_BT: Tensor  # noqa: N815
    ref_BT: Tensor  # noqa: N815


def make_targets(
    data: RolloutTensors, old_BT: Tensor, values_BT: Tensor, *, config: PpoConfig, kl_coef: float
) -> tuple[Targets, dict[str, float]]:
    """Targets and the metrics of the batch, from the trainer's own log-probs `old_BT` and values before the
    update.
    """
    mask_BT = data.mask_BT
    kl_BT = torch.where(mask_BT, kl_estimate(old_BT, data.ref_BT, "k1"), 0.0)
    scores_B = clip_scores(data.scores_B, config.score_clip)
    if config.missing_eos_penalty is not None:
        scores_B = penalise_missing_eos(
            scores_B, data.ended_B, penalty=config.missing_eos_penalty, mode=config.missing_eos_mode
        )
    in_reward = config.kl.place == "reward"
    estimator = config.kl.estimator or "k1"
    penalty_BT = kl_BT if not in_reward or estimator == "k1" else kl_estimate(old_BT, data.ref_BT, estimator)
    rewards_BT = token_rewards(penalty_BT, scores_B, mask_BT, kl_coef=kl_coef if in_reward else 0.0)
    non_score_B = rewards_BT.sum(1) - scores_B
    if config.whiten_rewards:
        rewards_BT = whiten_rewards(rewards_BT, mask_BT)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=config.gamma, lam=config.lam)
    explained = explained_variance(values_BT, returns_BT, mask_BT)
    if config.whiten_advantages:
        advantages_BT = whiten(advantages_BT, mask_BT)
    weights_BT, mismatch = importance_weights(data, old_BT, cap=config.importance_cap)
    metrics = mismatch | {
        "objective/kl": float(kl_BT.sum(1).mean()),
        "objective/entropy": float(-torch.where(mask_BT, old_BT, 0.0).sum(1).mean()),
        "objective/non_score_reward": float(non_score_B.mean()),
        "objective/rlhf_reward": float((scores_B + non_score_B).mean()),
        "objective/scores": float(data.scores_B.mean()),
        "objective/scores_std": float(data.scores_B.std(correction=0)),
        "objective/kl_coefficient": kl_coef,
        "val/explained_variance": float(explained),
        "val/values_avg": float(masked_mean(values_BT, mask_BT)),
        "val/num_eos_tokens": float(data.ended_B.sum()),
        "rollout/response_length_mean": float(mask_BT.sum()) / len(mask_BT),
        "rollout/response_length_max": float(mask_BT.shape[1]),
        "rollout/ended_share": float(data.ended_B.float().mean()),
    }
    targets = Targets(
        mask_BT=mask_BT,
        old_BT=old_BT,
        old_values_BT=values_BT,
        advantages_BT=advantages_BT,
        returns_BT=returns_BT,
        weights_BT=weights_BT,
        ref_BT=data.ref_BT,
    )
    return targets, metrics


def importance_weights(data: RolloutTensors, old_BT: Tensor, *, cap: float | None) -> tuple[Tensor, dict[str, float]]:
    """The truncated importance weight `[B, T]` of each token, of the trainer's log-probs `old_BT` against those under
    the weights that drew it; and the metrics that say how far apart the two are.

    Engine and trainer differ in their arithmetic; where a token is older than the update, in their weights too; and
    where an engine keeps its cache at a change of weights, new weights draw from what old ones computed. To tell these
    apart the same measures are given over all tokens, over the responses that the trained weights drew from the first
    token to the last (`_on_policy`: arithmetic alone), and over the tokens of each age (`_age_0`, `_age_1`, ...), as
    far as there are any.
    """
    mask_BT, ages_BT = data.mask_BT, data.ages_BT
    weights_BT, _ = truncated_importance_weights(old_BT, data.behaviour_BT, mask_BT, cap=cap)
    weights_T, ages_T = weights_BT[mask_BT], ages_BT[mask_BT].double()
    ages = torch.unique(ages_T.int()).tolist()
    groups = {"": mask_BT, "_on_policy": mask_BT & (ages_BT.amax(1, keepdim=True) == 0)}
    groups |= {f"_age_{age}": mask_BT & (ages_BT == age) for age in ages}
    metrics = {
        # Kish's effective sample size: 1 if all weights are alike.
        "tis/effective_share": float(weights_T.sum().square() / weights_T.square().sum() / len(weights_T)),
        "rollout/staleness_mean": float(ages_T.mean()),
        "rollout/staleness_max": float(ages_T.max()),
        "rollout/stale_token_share": float((ages_T > 0).double().mean()),
    }
    for suffix, of_group_BT in groups.items():
        if num_tokens := int(of_group_BT.sum()):
            metrics |= _mismatch(data, old_BT, of_group_BT, num_tokens, cap=cap, suffix=suffix)
    for age in ages:
        metrics[f"rollout/token_share_age_{age}"] = float((ages_T == age).double().mean())
    return weights_BT, metrics


def _mismatch(
    data: RolloutTensors, old_BT: Tensor, mask_BT: Tensor, num_tokens: int, *, cap: float | None, suffix: str
) -> dict[str, float]:
    _, sums = truncated_importance_weights(old_BT, data.behaviour_BT, mask_BT, cap=cap)
    largest = torch.where(mask_BT, old_BT - data.behaviour_BT, 0.0).abs().max()
    return {
        f"mismatch/logprob_abs_mean{suffix}": float(sums["behaviour/abs_diff"]) / num_tokens,
        f"mismatch/logprob_abs_max{suffix}": float(largest),
        f"mismatch/kl{suffix}": float(sums["behaviour/kl"]) / num_tokens,
        f"mismatch/ratio_mean{suffix}": float(sums["behaviour/ratio"]) / num_tokens,
        f"tis/capped_share{suffix}": float(sums["behaviour/capfrac"]) / num_tokens,
    }
