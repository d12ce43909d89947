"""The update: actor and critic, from a batch of rollouts.

Invariants:

- The gradient of an optimizer step is that of the whole minibatch: every loss is a sum over tokens divided by the
  tokens of the minibatch, so cutting it into micro-batches changes nothing but rounding.
- Only positions that predict a response token reach the heads and the last feed-forward block. Sequences are
  right-padded and length-sorted, so no attention mask is needed and little is padding.
- Old log-probs and values are the trainer's own, from before the update. When a batch is a single optimizer step
  the policy ratio is exactly one, so that forward pass is also the one that is differentiated: its graph is kept
  for as many tokens as `retained_tokens` allows, and only what exceeds it is computed a second time.
- While only the critic learns, nothing is differentiated through the actor.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steersman.trainer.algorithm.logprobs import logprobs_from_hidden
from steersman.trainer.algorithm.losses import kl_loss, policy_loss, value_loss
from steersman.trainer.algorithm.metrics import MetricSums, masked_sum
from steersman.trainer.checkpoint.models import hidden_states_at, lm_head, score_head
from steersman.trainer.data.batches import micro_batches, worthwhile_padding
from steersman.trainer.rollout.types import Rollout
from steersman.trainer.stages.optim import apply_update, build_optimizer
from steersman.trainer.stages.placement import place
from steersman.trainer.stages.ppo_batch import RolloutTensors, Targets, make_targets
from steersman.trainer.stages.ppo_config import PpoConfig

# About 2 GB for a model of 3.4M parameters. Host memory allows that; an accelerator's may not, so there the
# default is what a micro-batch needs anyway.
_CPU_RETAINED_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class _Micro:
    """Some rows of the batch, ready for a forward pass.

    `ids_bW` leaves out the last token of the longest row, which predicts nothing; `predicting_t` are flat
    positions in it whose states predict the response tokens `targets_t`, row by row.
    """

    rows_b: Tensor
    ids_bW: Tensor  # noqa: N815
    predicting_t: Tensor
    targets_t: Tensor


@dataclass(frozen=True, kw_only=True)
class _Outputs:
    """Per response token, row by row; with a graph if it was asked for."""

    logprobs_t: Tensor
    values_t: Tensor
    entropy_t: Tensor | None


class PpoLearner:
    """Owns actor, critic and their optimizers. Everything is float32 unless autocast is asked for."""

    def __init__(self, actor: PreTrainedModel, critic: PreTrainedModel, config: PpoConfig) -> None:
        self.actor = actor
        self.critic = critic
        self._config = config
        self._device = next(actor.parameters()).device
        self._head, self._value_head = lm_head(actor), score_head(critic)
        self._placement = place(str(self._device), config.dtype)
        self._settings = {"actor": config.optimizer, "critic": config.critic_optimizer}
        self._optimizers = {
            "actor": build_optimizer(config.optimizer, actor),
            "critic": build_optimizer(config.critic_optimizer, critic),
        }
        default = _CPU_RETAINED_TOKENS if self._device.type == "cpu" else config.micro_batch_tokens
        self._retained_tokens = default if config.retained_tokens is None else config.retained_tokens
        self._lr = dict.fromkeys(self._optimizers, 0.0)

    def update(self, rollouts: Sequence[Rollout], *, step: int, kl_coef: float) -> dict[str, float]:
        """Trains on one batch; gives its metrics. `step` counts from 0 and sets the learning rates."""
        if not rollouts:
            raise ValueError("rollouts are empty, at least one is needed")
        config = self._config
        data = RolloutTensors.of(rollouts, self._device, step=step)
        single = config.num_epochs == 1 and config.num_minibatches == 1
        old_BT, values_BT = torch.zeros_like(data.ref_BT), torch.zeros_like(data.ref_BT)
        pending: list[tuple[_Micro, _Outputs | None]] = []
        num_retained = 0
        for micro in self._micros(rollouts, range(len(rollouts))):
            retain = single and num_retained + micro.ids_bW.numel() <= self._retained_tokens
            outputs = self._forward(micro, step, grad=retain)
            _scatter(old_BT, data.mask_BT, micro.rows_b, outputs.logprobs_t)
            _scatter(values_BT, data.mask_BT, micro.rows_b, outputs.values_t)
            num_retained += micro.ids_bW.numel() if retain else 0
            pending.append((micro, outputs if retain else None))
        targets, metrics = make_targets(data, old_BT, values_BT, config=config, kl_coef=kl_coef)

        sums = MetricSums()
        ratios: list[float] = []
        norms: dict[str, list[float]] = {"actor": [], "critic": []}
        if single:
            self._optimizer_step(pending, targets, kl_coef, step, sums, ratios, norms)
        else:
            for epoch in range(config.num_epochs):
                for rows in self._minibatches(len(rollouts), step, epoch):
                    micros = ((micro, None) for micro in self._micros(rollouts, rows))
                    self._optimizer_step(micros, targets, kl_coef, step, sums, ratios, norms)
        means = sums.means()
        ratio_mean = sum(ratios) / len(ratios)
        return metrics | {
            "policy/approxkl_avg": means["policy/approxkl"],
            "policy/clipfrac_avg": means["policy/clipfrac"],
            "loss/policy_avg": means["policy/loss"],
            "loss/value_avg": means["value/loss"],
            "val/clipfrac_avg": means["value/clipfrac"],
            "val/ratio": ratio_mean,
            "val/ratio_var": sum((ratio - ratio_mean) ** 2 for ratio in ratios) / len(ratios),
            "policy/grad_norm": sum(norms["actor"]) / max(len(norms["actor"]), 1),
            "val/grad_norm": sum(norms["critic"]) / len(norms["critic"]),
            "lr": self._lr["actor"],
            "lr/critic": self._lr["critic"],
            **({"policy/entropy_avg": means["entropy"]} if "entropy" in means else {}),
            **({"loss/kl_avg": means["policy/kl_loss"]} if "policy/kl_loss" in means else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """The optimizers' state; the models are saved as model files."""
        return {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state[name])

    def _optimizer_step(
        self,
        micros: "Sequence[tuple[_Micro, _Outputs | None]] | Iterator[tuple[_Micro, _Outputs | None]]",
        targets: Targets,
        kl_coef: float,
        step: int,
        sums: MetricSums,
        ratios: list[float],
        norms: dict[str, list[float]],
    ) -> None:
        micros = list(micros)
        num_tokens = sum(len(micro.targets_t) for micro, _ in micros)
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        ratio_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        while micros:
            micro, outputs = micros.pop(0)  # the graph of a micro-batch dies with its backward pass
            outputs = outputs if outputs is not None else self._forward(micro, step, grad=True)
            loss, ratio = self._losses(micro, outputs, targets, kl_coef, num_tokens, sums)
            ratio_sum += ratio
            del outputs
            loss.backward()  # type: ignore[no-untyped-call]
        ratios.append(float(ratio_sum) / num_tokens)
        for name, optimizer in self._optimizers.items():
            if name == "actor" and self._is_warm_up(step):
                continue
            applied = apply_update(optimizer, self._settings[name], step=step, total_steps=self._config.total_steps)
            self._lr[name] = applied["lr"]
            norms[name].append(applied["grad_norm"])

    def _losses(
        self,
        micro: _Micro,
        outputs: _Outputs,
        targets: Targets,
        kl_coef: float,
        num_tokens: int,
        sums: MetricSums,
    ) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch as its share of the minibatch, and the sum of its policy ratios."""
        config = self._config
        mask_bT = targets.mask_BT[micro.rows_b]
        all_t = torch.ones_like(micro.targets_t, dtype=torch.bool)

        def flat(x_BT: Tensor) -> Tensor:
            return x_BT[micro.rows_b][mask_bT]

        actor = policy_loss(
            outputs.logprobs_t,
            flat(targets.old_BT),
            flat(targets.advantages_BT),
            all_t,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            denominator=num_tokens,
            weights=flat(targets.weights_BT),
        )
        critic = value_loss(
            outputs.values_t,
            flat(targets.old_values_BT),
            flat(targets.returns_BT),
            all_t,
            clip_range=config.value_clip,
            denominator=num_tokens,
        )
        sums.add({**actor.sums, **critic.sums}, count=actor.count)
        loss = actor.loss + critic.loss
        if config.kl.place == "loss" and kl_coef > 0:
            kl = kl_loss(
                outputs.logprobs_t,
                flat(targets.ref_BT),
                all_t,
                estimator=config.kl.estimator or "k2",
                denominator=num_tokens,
                weights=flat(targets.weights_BT),
            )
            sums.add(kl.sums, count=kl.count)
            loss = loss + kl_coef * kl.loss
        if outputs.entropy_t is not None:
            entropy = masked_sum(outputs.entropy_t, all_t)
            sums.add({"entropy": entropy.detach()}, count=actor.count)
            if config.entropy_coefficient > 0:
                loss = loss - config.entropy_coefficient * entropy / num_tokens
        return loss, actor.sums["policy/ratio"].double()

    def _is_warm_up(self, step: int) -> bool:
        return step < self._config.critic_warmup_steps

    def _forward(self, micro: _Micro, step: int, *, grad: bool) -> _Outputs:
        config = self._config
        with torch.set_grad_enabled(grad and not self._is_warm_up(step)), self._placement.autocast():
            states_tD = hidden_states_at(self.actor, micro.ids_bW, micro.predicting_t)
            taken = logprobs_from_hidden(
                states_tD,
                self._head.weight,
                micro.targets_t,
                bias_V=self._head.bias,
                temperature=config.sampling.temperature,
                with_entropy=grad and (config.exact_entropy or config.entropy_coefficient > 0),
            )
        with torch.set_grad_enabled(grad), self._placement.autocast():
            value_states_tD = hidden_states_at(self.critic, micro.ids_bW, micro.predicting_t)
            values_t = self._value_head(value_states_tD).squeeze(-1).float()
        return _Outputs(logprobs_t=taken.logprobs, values_t=values_t, entropy_t=taken.entropy)

    def _micros(self, rollouts: Sequence[Rollout], rows: Sequence[int]) -> Iterator[_Micro]:
        lengths = [rollouts[row].num_tokens for row in rows]
        worth = worthwhile_padding(self._placement.device)
        for group in micro_batches(lengths, token_budget=self._config.micro_batch_tokens, max_padding=worth):
            yield self._micro(rollouts, [rows[item] for item in group])

    def _micro(self, rollouts: Sequence[Rollout], rows: Sequence[int]) -> _Micro:
        width = max(rollouts[row].num_tokens for row in rows) - 1
        ids_bW = torch.zeros(len(rows), width, dtype=torch.int64)
        predicting: list[Tensor] = []
        targets: list[Tensor] = []
        for number, row in enumerate(rows):
            rollout = rollouts[row]
            prompt, response = torch.from_numpy(rollout.prompt.token_ids), torch.from_numpy(rollout.response_ids)
            ids = torch.cat([prompt, response]).long()
            ids_bW[number, : len(ids) - 1] = ids[:-1]
            first = number * width + len(prompt) - 1
            predicting.append(torch.arange(first, first + len(response)))
            targets.append(ids[len(prompt) :])
        return _Micro(
            rows_b=torch.tensor(rows, device=self._device),
            ids_bW=ids_bW.to(self._device),
            predicting_t=torch.cat(predicting).to(self._device),
            targets_t=torch.cat(targets).to(self._device),
        )

    def _minibatches(self, num_samples: int, step: int, epoch: int) -> list[list[int]]:
        """Rows of each optimizer step: a fresh shuffle that depends on seed, step and epoch alone."""
        rows = list(range(num_samples))
        random.Random(f"{self._config.seed}/{step}/{epoch}").shuffle(rows)
        count = min(self._config.num_minibatches, num_samples)
        return [rows[number::count] for number in range(count)]


def _scatter(into_BT: Tensor, mask_BT: Tensor, rows_b: Tensor, values_t: Tensor) -> None:
    """Puts the tokens of some rows, one row after the other, where they belong."""
    rows_bT = into_BT[rows_b]
    rows_bT[mask_BT[rows_b]] = values_t.detach()
    into_BT[rows_b] = rows_bT
