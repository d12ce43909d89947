"""One update: the same whatever the micro-batches, and what a slow, plain form of PPO gives."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from steersman.trainer.rollout.types import FinishReason, Prompt, Rollout, VersionSpan, WeightVersion
from steersman.trainer.stages.linear import speed_up
from steersman.trainer.stages.packed import let_pack
from steersman.trainer.stages.ppo_config import PpoConfig
from steersman.trainer.stages.ppo_learner import PpoLearner

VOCABULARY = 24
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def models(seed: int = 0) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    actor = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).eval()
    critic = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1, pad_token_id=0)).eval()
    return actor, critic


def config(**changes: Any) -> PpoConfig:
    rate = {"learning_rate": 1e-3, "schedule": "constant", "max_grad_norm": 0.5}
    settings: dict[str, Any] = {
        "actor": {"path": "unused"},
        "prompts": {"files": ["unused"]},
        "prompts_per_step": 6,
        "optimizer": rate,
        "critic_optimizer": rate,
        "sampling": {"temperature": 0.7, "max_tokens": 12},
        "device": "cpu",
    }
    return PpoConfig.model_validate(settings | changes)


def rollouts(seed: int = 0, count: int = 6) -> list[Rollout]:
    generator = np.random.default_rng(seed)
    made = []
    for index in range(count):
        prompt = generator.integers(1, VOCABULARY, generator.integers(1, 6)).astype(np.int32)
        length = int(generator.integers(1, 12))
        made.append(
            Rollout(
                prompt=Prompt(index=index, token_ids=prompt),
                sample=0,
                response_ids=generator.integers(1, VOCABULARY, length).astype(np.int32),
                behaviour_logprobs=generator.normal(-3.2, 0.3, length).astype(np.float32),
                ref_logprobs=generator.normal(-3.2, 0.3, length).astype(np.float32),
                weight_versions=(VersionSpan(version=WeightVersion(run_id="demo.1", step=0), start=0, end=length),),
                score=float(generator.normal()),
                finish_reason=FinishReason.STOP if index % 2 else FinishReason.LENGTH,
            )
        )
    return made


def update(settings: PpoConfig, *, step: int = 0, packed: bool = False) -> tuple[dict[str, float], list[Tensor]]:
    actor, critic = models()
    if packed:
        assert all([let_pack(actor), let_pack(critic)])
    if settings.fast_linear:
        speed_up(actor)
        speed_up(critic)
    learner = PpoLearner(actor, critic, settings)
    metrics = learner.update(rollouts(), step=step, kl_coef=0.1)
    return metrics, [p.detach() for model in (actor, critic) for p in model.parameters()]


def assert_alike(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 2e-6) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_epochs": 2, "num_minibatches": 2},
        {"kl": {"place": "loss", "estimator": "k3"}, "entropy_coefficient": 0.01},
    ],
)
def test_micro_batches_and_kept_graphs_change_nothing(changes: dict[str, Any]) -> None:
    whole_metrics, whole = update(config(micro_batch_tokens=10_000, **changes))
    for settings in (
        config(micro_batch_tokens=1, **changes),
        config(micro_batch_tokens=40, retained_tokens=0, **changes),
        config(micro_batch_tokens=40, retained_tokens=45, **changes),  # some graphs kept, the rest computed again
        config(micro_batch_tokens=40, fast_linear=False, **changes),
    ):
        for packed in (False, True):
            metrics, parameters = update(settings, packed=packed)
            assert_alike(parameters, whole)
            assert metrics == pytest.approx(whole_metrics, rel=2e-3, abs=2e-5)


def slow_step(settings: PpoConfig, kl_coef: float) -> tuple[dict[str, float], list[Tensor]]:
    """PPO token by token, sequence by sequence, with whole logits and no batching at all."""
    actor, critic = models()
    batch = rollouts()
    temperature = settings.sampling.temperature
    logprobs, values, advantages, returns, weights = [], [], [], [], []
    scores = [r.score - (0.5 if r.finish_reason is FinishReason.LENGTH else 0.0) for r in batch]
    for rollout, score in zip(batch, scores, strict=True):
        ids = torch.tensor([[*rollout.prompt.token_ids.tolist(), *rollout.response_ids.tolist()]])
        first = len(rollout.prompt.token_ids)
        distribution = torch.log_softmax(actor(ids).logits[0] / temperature, -1)
        states = critic.model(ids).last_hidden_state[0]
        taken = torch.stack([distribution[t - 1, ids[0, t]] for t in range(first, ids.shape[1])])
        value = torch.stack([critic.score(states[t - 1])[0] for t in range(first, ids.shape[1])])
        logprobs.append(taken)
        values.append(value)
        old, old_value = taken.detach(), value.detach()
        rewards = -kl_coef * (old - torch.tensor(rollout.ref_logprobs))
        rewards[-1] += score
        advantage = torch.zeros_like(rewards)
        running = 0.0
        for t in reversed(range(len(rewards))):
            following = old_value[t + 1] if t + 1 < len(rewards) else 0.0
            running = rewards[t] + settings.gamma * following - old_value[t] + settings.gamma * settings.lam * running
            advantage[t] = running
        advantages.append(advantage)
        returns.append(advantage + old_value)
        weights.append((old - torch.tensor(rollout.behaviour_logprobs)).exp().clamp(max=settings.importance_cap))
    flat = torch.cat(advantages)
    mean, std = flat.mean(), (flat.var(correction=0) + 1e-8).sqrt()
    num_tokens = len(flat)
    policy = value_error = torch.zeros(())
    for logprob, value, advantage, target, weight in zip(logprobs, values, advantages, returns, weights, strict=True):
        ratio = (logprob - logprob.detach()).exp()
        policy = policy - (ratio * (advantage - mean) / std * weight).sum() / num_tokens
        value_error = value_error + 0.5 * (value - target).square().sum() / num_tokens
    for model, loss, optim in ((actor, policy, settings.optimizer), (critic, value_error, settings.critic_optimizer)):
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            eps=optim.epsilon,
            weight_decay=0,
        )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        optimizer.step()
    references = torch.cat([torch.tensor(rollout.ref_logprobs) for rollout in batch])
    taken = torch.cat(logprobs).detach()
    kl = float((taken - references).sum())
    metrics = {
        "objective/kl": kl / len(batch),
        "objective/entropy": -float(taken.sum()) / len(batch),
        "objective/rlhf_reward": sum(scores) / len(batch) - kl_coef * kl / len(batch),
        "objective/non_score_reward": -kl_coef * kl / len(batch),
        "objective/scores": sum(r.score for r in batch) / len(batch),
        "loss/value_avg": value_error.item(),
        "loss/policy_avg": policy.item(),
        "val/num_eos_tokens": 3.0,
        "rollout/response_length_mean": num_tokens / len(batch),
        "val/ratio": 1.0,
        "policy/approxkl_avg": 0.0,
    }
    return metrics, [p.detach() for model in (actor, critic) for p in model.parameters()]


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_is_what_plain_ppo_gives(packed: bool) -> None:
    settings = config(missing_eos_penalty=0.5, gamma=0.9, lam=0.8, importance_cap=1.1, micro_batch_tokens=40)
    expected_metrics, expected = slow_step(settings, kl_coef=0.1)
    metrics, parameters = update(settings, packed=packed)
    # Adam's first step is the sign of the gradient times the rate: a wrong gradient shows as 1e-3.
    assert_alike(parameters, expected, tolerance=2e-5)
    assert {name: metrics[name] for name in expected_metrics} == pytest.approx(expected_metrics, rel=1e-4, abs=1e-5)


def test_further_epochs_leave_the_old_policy_and_are_clipped() -> None:
    once, _ = update(config())
    often, _ = update(config(num_epochs=8, clip_low=0.01))
    assert (once["val/ratio"], once["val/ratio_var"], once["policy/clipfrac_avg"]) == (1.0, 0.0, 0.0)
    assert often["val/ratio_var"] > 0
    assert often["policy/clipfrac_avg"] > 0
    assert often["policy/approxkl_avg"] > 0


def test_the_critic_can_learn_alone_first() -> None:
    _, fresh = update(config(critic_warmup_steps=1), step=0)
    actor, critic = models()
    untouched = [p.detach() for p in actor.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(fresh, untouched, strict=False))
    moved = zip(fresh[len(untouched) :], critic.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in moved)
    _, later = update(config(critic_warmup_steps=1), step=1)
    assert any(not torch.equal(one, other) for one, other in zip(later, untouched, strict=False))


@pytest.mark.parametrize("changes", [{}, {"num_epochs": 2, "kl": {"place": "loss"}, "entropy_coefficient": 0.01}])
def test_nothing_is_differentiated_through_an_actor_that_does_not_learn_yet(changes: dict[str, Any]) -> None:
    actor, critic = models()
    seen: dict[str, int] = {"actor": 0, "critic": 0}
    for name, model in (("actor", actor), ("critic", critic)):
        for parameter in model.parameters():
            parameter.register_hook(lambda _, name=name: seen.update({name: seen[name] + 1}))
    learner = PpoLearner(actor, critic, config(critic_warmup_steps=1, **changes))
    learner.update(rollouts(), step=0, kl_coef=0.1)
    assert seen["actor"] == 0
    assert seen["critic"] > 0
    learner.update(rollouts(), step=1, kl_coef=0.1)
    assert seen["actor"] > 0


def test_a_state_goes_on_bit_by_bit() -> None:
    settings = config(num_epochs=2)
    actor, critic = models()
    learner = PpoLearner(actor, critic, settings)
    learner.update(rollouts(1), step=0, kl_coef=0.1)
    copied = copy.deepcopy(actor), copy.deepcopy(critic)
    other = PpoLearner(*copied, settings)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert learner.update(rollouts(2), step=1, kl_coef=0.1) == other.update(rollouts(2), step=1, kl_coef=0.1)
    assert all(torch.equal(a, b) for a, b in zip(actor.parameters(), copied[0].parameters(), strict=True))


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="rollouts are empty"):
        PpoLearner(*models(), config()).update([], step=0, kl_coef=0.1)


def test_images_lie_where_they_are_asked_for() -> None:
    version = WeightVersion(run_id="demo.1", step=1)
    services = {"push_image": "device"}
    learner = PpoLearner(*models(), config(services=services))
    learner.actor.to("meta")  # a device that nothing can be copied from
    assert learner.image(version) is not None
    learner = PpoLearner(*models(), config())
    learner.actor.to("meta")
    with pytest.raises(NotImplementedError, match="meta"):
        learner.image(version)
