"""The update: actor and critic, from a batch of rollouts.

Invariants:

- The gradient of an optimizer step is that of the whole minibatch: every loss is a sum over tokens divided by the
  tokens of the minibatch, so cutting it into micro-batches changes nothing but rounding.
- Only positions that predict a response token reach the heads and the last feed-forward block. Sequences are packed
  without padding where both models can do that, else right-padded and length-sorted, so that little is padding.
- Old log-probs and values are the trainer's own, from before the update. When a batch is a single optimizer step
  the policy ratio is exactly one, so that forward pass is also the one that is differentiated: its graph is kept
  for as many tokens as `retained_tokens` allows, and only what exceeds it is computed a second time.
- While only the critic learns, nothing is differentiated through the actor.
- On several ranks each has the whole batch, computes the rows of its share, and adds up with the others: log-probs and
  values of all rows, hence the same targets everywhere; then gradients. Ranks make as many passes as the one that makes
  most, with rows that do not count where they have no more: every pass is a collective.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steersman.trainer.algorithm.logprobs import logprobs_from_hidden
from steersman.trainer.algorithm.losses import kl_loss, policy_loss, value_loss
from steersman.trainer.algorithm.metrics import MetricSums, masked_sum
from steersman.trainer.checkpoint.models import lm_head, score_head
from steersman.trainer.data.batches import Pass, passes, worthwhile_padding
from steersman.trainer.distributed.totals import total
from steersman.trainer.distributed.world import SOLO, Scope, World, direct
from steersman.trainer.rollout.types import Rollout
from steersman.trainer.stages.optim import apply_update, build_optimizer
from steersman.trainer.stages.packed import TokenBatch, batch_of, packing_step, states_at
from steersman.trainer.stages.placement import place
from steersman.trainer.stages.ppo_batch import RolloutTensors, Targets, make_targets
from steersman.trainer.stages.ppo_config import PpoConfig
from steersman.trainer.stages.trained import Trained
from steersman.trainer.weights.image import Image, WeightImage
from steersman.wire.identity import WeightVersion

# About 2 GB for a model of 3.4M parameters. Host memory allows that; an accelerator's may not, so there the
# default is what a micro-batch needs anyway.
_CPU_RETAINED_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class _Micro:
    """Some rows of the batch, ready for a forward pass.

    `batch` leaves out the last token of each row, which predicts nothing. The states at its flat `predicting_p` predict
    the response tokens `targets_t`, row by row; `targets_p` are these. What `p` has beyond `t` does not count.
    """

    rows_b: Tensor
    batch: TokenBatch
    predicting_p: Tensor
    targets_p: Tensor
    targets_t: Tensor
    counts: bool = True


@dataclass(frozen=True, kw_only=True)
class _Outputs:
    """Per response token, row by row; with a graph if it was asked for."""

    logprobs_t: Tensor
    values_t: Tensor
    entropy_t: Tensor | None


class Learner(Protocol):
    """What the loop asks of the models. On several ranks each call is a collective."""

    def update(self, rollouts: Sequence[Rollout], *, step: int, kl_coef: float) -> dict[str, float]:
        """Trains on one batch; gives its metrics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the trainer state keeps of the optimizers."""
        ...

    def write(self, directory: Path) -> None:
        """Writes the rest into `directory`, of a checkpoint."""
        ...

    def read(self, directory: Path, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        ...

    def image(self, version: WeightVersion) -> Image | None:
        """A copy of the actor's weights, to be published; None but on the lead."""
        ...

    def whole_actor(self) -> PreTrainedModel | None:
        """The actor with all its weights; None but on the lead."""
        ...


class PpoLearner:
    """Owns actor, critic and their optimizers. Everything is float32 unless autocast is asked for.

    Args:
        world: the ranks, on each of which a learner does the same calls at the same time.
        actor_scope, critic_scope: where their parameters are whole, if they are sharded.
    """

    def __init__(
        self,
        actor: PreTrainedModel,
        critic: PreTrainedModel,
        config: PpoConfig,
        *,
        world: World = SOLO,
        actor_scope: Scope[Any] = direct,
        critic_scope: Scope[Any] = direct,
    ) -> None:
        self.actor = actor
        self.critic = critic
        self._world = world
        self._actor_scope, self._critic_scope = actor_scope, critic_scope
        self._config = config
        self._device = next(actor.parameters()).device
        self._head, self._value_head = lm_head(actor), score_head(critic)
        self._placement = place(str(self._device), config.dtype)
        self._packing_step = packing_step(actor, critic)
        self._settings = {"actor": config.optimizer, "critic": config.critic_optimizer}
        self._optimizers = {
            "actor": build_optimizer(config.optimizer, actor),
            "critic": build_optimizer(config.critic_optimizer, critic),
        }
        default = _CPU_RETAINED_TOKENS if self._device.type == "cpu" else config.micro_batch_tokens
        self._retained_tokens = default if config.retained_tokens is None else config.retained_tokens
        self._trained = Trained(world=world, models={"actor": actor, "critic": critic}, optimizers=self._optimizers)
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
        for one in self._passes(rollouts, range(len(rollouts))):
            micro = self._micro(rollouts, one)
            # Ranks differentiate the same passes, so the one with most tokens decides.
            num_tokens = max(one.num_tokens)
            retain = single and num_retained + num_tokens <= self._retained_tokens
            outputs = self._forward(micro, step, grad=retain)
            if micro.counts:
                _scatter(old_BT, data.mask_BT, micro.rows_b, outputs.logprobs_t)
                _scatter(values_BT, data.mask_BT, micro.rows_b, outputs.values_t)
            num_retained += num_tokens if retain else 0
            pending.append((micro, outputs if retain else None))
        self._world.sum(old_BT, values_BT)
        targets, metrics = make_targets(data, old_BT, values_BT, config=config, kl_coef=kl_coef)

        sums = MetricSums()
        ratios: list[float] = []
        norms: dict[str, list[float]] = {"actor": [], "critic": []}
        if single:
            self._optimizer_step(pending, _num_tokens(rollouts), targets, kl_coef, step, sums, ratios, norms)
        else:
            for epoch in range(config.num_epochs):
                for rows in self._minibatches(len(rollouts), step, epoch):
                    passes = self._passes(rollouts, rows)
                    micros: list[tuple[_Micro, _Outputs | None]] = [
                        (self._micro(rollouts, one), None) for one in passes
                    ]
                    num_tokens = _num_tokens([rollouts[row] for row in rows])
                    self._optimizer_step(micros, num_tokens, targets, kl_coef, step, sums, ratios, norms)
        means = total(self._world, sums).means()
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
        """What the trainer state keeps of the optimizers; the rest is written by `write`."""
        return self._trained.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave, where the optimizers are whole."""
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state[name])

    def write(self, directory: Path) -> None:
        """Writes the models into `directory`, of a checkpoint. A collective."""
        self._trained.write(directory)

    def read(self, directory: Path, state: dict[str, Any]) -> None:
        """Goes on from the checkpoint in `directory`, whose state has what `state_dict` gave. CheckpointError."""
        self._trained.read(directory, state)

    def image(self, version: WeightVersion) -> WeightImage | None:
        """A copy of the actor's weights, to be published; None but on the lead. A collective."""
        actor = self.whole_actor()
        device = "cpu" if self._config.services.push_image == "host" else None
        return WeightImage.of(actor, version, device=device) if actor is not None else None

    def whole_actor(self) -> PreTrainedModel | None:
        """The actor with all its weights; None but on the lead. A collective."""
        return self._trained.whole("actor")

    def _optimizer_step(
        self,
        micros: list[tuple[_Micro, _Outputs | None]],
        num_tokens: int,
        targets: Targets,
        kl_coef: float,
        step: int,
        sums: MetricSums,
        ratios: list[float],
        norms: dict[str, list[float]],
    ) -> None:
        """One step of both optimizers on `num_tokens` tokens, of which this rank has those of `micros`."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        ratio_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        while micros:
            micro, outputs = micros.pop(0)  # the graph of a micro-batch dies with its backward pass
            outputs = outputs if outputs is not None else self._forward(micro, step, grad=True)
            own = MetricSums()
            loss, ratio = self._losses(micro, outputs, targets, kl_coef, num_tokens, own)
            del outputs
            if micro.counts:
                sums.merge(own)
                ratio_sum += ratio
            else:
                sums.add({name: torch.zeros_like(value) for name, value in own.totals.items()}, count=0)
                loss = loss * 0.0
            loss.backward()  # type: ignore[no-untyped-call]
        self._world.sum(ratio_sum)
        ratios.append(float(ratio_sum) / num_tokens)
        for name, optimizer in self._optimizers.items():
            if name == "actor" and self._is_warm_up(step):
                continue
            applied = apply_update(
                optimizer,
                self._settings[name],
                step=step,
                total_steps=self._config.total_steps,
                world=self._world,
            )
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
        config, num_targets = self._config, len(micro.targets_t)

        def take() -> tuple[Tensor, Tensor | None]:
            states_pD = states_at(self.actor, micro.batch, micro.predicting_p)
            taken = logprobs_from_hidden(
                states_pD,
                self._head.weight,
                micro.targets_p,
                bias_V=self._head.bias,
                temperature=config.sampling.temperature,
                with_entropy=grad and (config.exact_entropy or config.entropy_coefficient > 0),
            )
            entropy_t = None if taken.entropy is None else taken.entropy[:num_targets]
            return taken.logprobs[:num_targets], entropy_t

        def judge() -> Tensor:
            states_pD = states_at(self.critic, micro.batch, micro.predicting_p)
            values_p: Tensor = self._value_head(states_pD).squeeze(-1).float()
            return values_p[:num_targets]

        with torch.set_grad_enabled(grad and not self._is_warm_up(step)), self._placement.autocast():
            logprobs_t, entropy_t = self._actor_scope(take)
        with torch.set_grad_enabled(grad), self._placement.autocast():
            values_t = self._critic_scope(judge)
        return _Outputs(logprobs_t=logprobs_t, values_t=values_t, entropy_t=entropy_t)

    def _passes(self, rollouts: Sequence[Rollout], rows: Sequence[int]) -> list[Pass]:
        """This rank's micro-batches of `rows`; items are numbers of rollouts."""
        made = passes(
            [rollouts[row].num_tokens - 1 for row in rows],
            token_budget=self._config.micro_batch_tokens,
            max_padding=worthwhile_padding(self._placement.device),
            packed=self._packing_step is not None,
            rank=self._world.rank,
            num_ranks=self._world.size,
        )
        return [replace(one, items=[rows[item] for item in one.items]) for one in made]

    def _micro(self, rollouts: Sequence[Rollout], one: Pass) -> _Micro:
        prompts = [torch.tensor(rollouts[row].prompt.token_ids) for row in one.items]
        responses = [torch.tensor(rollouts[row].response_ids) for row in one.items]
        rows = [torch.cat(each)[:-1] for each in zip(prompts, responses, strict=True)]
        batch = batch_of(rows, self._device, step=self._packing_step)
        ends = [start + len(row) for start, row in zip(batch.starts_B, rows, strict=True)]
        predicting = [torch.arange(end - len(ids), end) for end, ids in zip(ends, responses, strict=True)]
        predicting_p, targets_t = batch.rounded(torch.cat(predicting)), torch.cat(responses).long().to(self._device)
        return _Micro(
            rows_b=torch.tensor(one.items, device=self._device),
            batch=batch,
            predicting_p=predicting_p.to(self._device),
            targets_p=nn.functional.pad(targets_t, (0, len(predicting_p) - len(targets_t))),
            targets_t=targets_t,
            counts=one.counts,
        )

    def _minibatches(self, num_samples: int, step: int, epoch: int) -> list[list[int]]:
        """Rows of each optimizer step: a fresh shuffle that depends on seed, step and epoch alone."""
        rows = list(range(num_samples))
        random.Random(f"{self._config.seed}/{step}/{epoch}").shuffle(rows)
        count = min(self._config.num_minibatches, num_samples)
        return [rows[number::count] for number in range(count)]


def _num_tokens(rollouts: Sequence[Rollout]) -> int:
    return sum(len(rollout.response_ids) for rollout in rollouts)


def _scatter(into_BT: Tensor, mask_BT: Tensor, rows_b: Tensor, values_t: Tensor) -> None:
    """Puts the tokens of some rows, one row after the other, where they belong."""
    rows_bT = into_BT[rows_b]
    rows_bT[mask_BT[rows_b]] = values_t.detach()
    into_BT[rows_b] = rows_bT
