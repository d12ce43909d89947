"""The loop with services that answer from memory: it learns, it stops, and it goes on exactly where it was."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from steersman.trainer.checkpoint.models import load_actor, load_tokenizer
from steersman.trainer.checkpoint.source import ModelSource
from steersman.trainer.rollout.types import Drop, FinishReason, Prompt, Rollout, RolloutBatch, VersionSpan
from steersman.trainer.stages import ppo_loop
from steersman.trainer.stages.ppo_config import PpoConfig
from steersman.trainer.stages.ppo_learner import PpoLearner
from steersman.trainer.stages.ppo_loop import PpoLoop, PpoResult, load_models
from steersman.trainer.stages.run import Run, read_rows
from steersman.trainer.weights.image import WeightImage
from steersman.trainer.weights.publisher import PublishReport

LIKED = 7  # the token that the reward counts
MAX_TOKENS = 6


class FakeServices:
    """Draws with the published weights, scores by the share of one token; all of it depends on the step alone."""

    def __init__(self, frozen: PreTrainedModel) -> None:
        self.frozen = frozen
        self.policy = load_copy(frozen)
        self.events: list[str] = []
        self.image: WeightImage | None = None
        self.before_collect: Callable[[], None] = lambda: None
        self.num_drops = 0
        self.hang = False

    def publish(self, image: WeightImage) -> "Future[PublishReport]":
        self.events.append(f"publish {image.version}")
        self.image = image
        self.policy.load_state_dict(image._tensors)
        return done(PublishReport(seconds=0.0))

    def collect(self, prompts: Sequence[Prompt]) -> "Future[RolloutBatch]":
        assert self.image is not None, "prompts before the first weights"
        self.before_collect()
        self.events.append(f"collect at {self.image.version.step}")
        if self.hang:
            return Future()
        generator = torch.Generator().manual_seed(self.image.version.step)
        rollouts = self._draw(prompts, generator)
        drops = tuple(
            Drop(key=rollout.key, service="reward at r:1", reason="gone", cause="INTERNAL")
            for rollout in rollouts[: self.num_drops]
        )
        return done(RolloutBatch(rollouts=tuple(rollouts[self.num_drops :]), drops=drops))

    def waiting(self) -> str:
        return "waiting for policy at nowhere: 3 s" if self.hang else ""

    def close(self) -> None:
        self.events.append("close")

    @torch.no_grad()
    def _draw(self, prompts: Sequence[Prompt], generator: torch.Generator) -> list[Rollout]:
        assert self.image is not None
        ids = torch.stack([torch.from_numpy(prompt.token_ids).long() for prompt in prompts])  # all of one length
        first, logprobs = ids.shape[1], []
        for _ in range(MAX_TOKENS):
            distribution = torch.log_softmax(self.policy(ids).logits[:, -1], -1)
            token = torch.multinomial(distribution.exp(), 1, generator=generator)
            logprobs.append(distribution.gather(1, token))
            ids = torch.cat([ids, token], 1)
        responses = ids[:, first:]
        reference = torch.log_softmax(self.frozen(ids).logits[:, first - 1 : -1], -1)
        behaviour, reference = torch.cat(logprobs, 1), reference.gather(2, responses[:, :, None])[:, :, 0]
        return [
            Rollout(
                prompt=prompt,
                sample=0,
                response_ids=responses[row].numpy().astype(np.int32),
                behaviour_logprobs=behaviour[row].numpy(),
                ref_logprobs=reference[row].numpy(),
                weight_versions=(VersionSpan(version=self.image.version, start=0, end=MAX_TOKENS),),
                score=float((responses[row] == LIKED).float().mean()),
                finish_reason=FinishReason.LENGTH,
            )
            for row, prompt in enumerate(prompts)
        ]


def done(result: Any) -> Future:
    future: Future = Future()
    future.set_result(result)
    return future


def load_copy(model: PreTrainedModel) -> PreTrainedModel:
    copied = type(model)(model.config).eval()
    copied.load_state_dict(model.state_dict())
    return copied


class Listener:
    def __init__(self) -> None:
        self.messages: list[str] = []

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def on_progress(self, step: int, total_steps: int, message: str) -> None:
        self.messages.append(message)


@pytest.fixture
def make(tmp_path: Path, tiny_tokenizer: str, tiny_model: ModelSource, write_rows):
    """Builds a loop in a run folder; `run_id` is counted up by the caller, as `run_ppo` does."""
    data = write_rows([{"prompt": f"Human : w{n} Assistant :"} for n in range(16)], "prompts.jsonl")
    tokenizer = load_tokenizer(tiny_tokenizer)

    def build(folder: str = "run", run_id: str = "demo.1", stop=lambda: False, **changes: Any):
        settings: dict[str, Any] = {
            "actor": tiny_model.model_dump(),
            "tokenizer": tiny_tokenizer,
            "prompts": {"files": [data]},
            "prompts_per_step": 16,
            "total_steps": 4,
            "max_staleness": 0,
            "sampling": {"max_tokens": MAX_TOKENS, "ignore_eos": True},
            "optimizer": {"learning_rate": 2e-2, "schedule": "linear"},
            "critic_optimizer": {"learning_rate": 5e-3},
            "kl": {"coefficient": 0.02, "target": 5.0},
            "save_every_steps": 2,
            "seed": 3,
            "device": "cpu",
        }
        config = PpoConfig.model_validate(settings | changes)
        actor, critic = load_models(config, tokenizer)
        services = FakeServices(load_actor(config.actor, seed=config.seed, tokenizer=tokenizer))
        listener = Listener()
        run = Run(tmp_path / folder, run_id="demo", listener=listener, stop_requested=stop)
        loop = PpoLoop(config, run, PpoLearner(actor, critic, config), services, tokenizer=tokenizer, run_id=run_id)
        return loop, services, run, listener

    return build


def go(loop: PpoLoop, run: Run) -> PpoResult:
    with run:
        return loop.run()


def test_the_reward_goes_up(make) -> None:
    loop, _, run, _ = make(total_steps=25)
    result = go(loop, run)
    rows = read_rows(run.directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 26))
    first, last = rows[0]["objective/scores"], rows[-1]["objective/scores"]
    assert first < 0.15
    assert last > 0.6
    assert rows[-1]["objective/kl"] > rows[0]["objective/kl"]
    assert all(row["mismatch/logprob_abs_max"] < 1e-4 for row in rows)  # the same model drew and trained
    assert result.model_directory == run.directory / "model"
    assert {"step", "prompt", "response", "score"} <= set(read_rows(run.directory / "samples.jsonl")[0])


@pytest.mark.parametrize("staleness", [0, 1])
def test_weights_come_before_prompts_and_after_every_update(make, staleness: int) -> None:
    loop, services, run, _ = make(total_steps=3, max_staleness=staleness)
    go(loop, run)
    on_policy = ["publish demo.1@0", "collect at 0"]
    on_policy += ["publish demo.1@1", "collect at 1", "publish demo.1@2", "collect at 2", "publish demo.1@3"]
    ahead = ["publish demo.1@0", "collect at 0", "collect at 0"]
    ahead += ["publish demo.1@1", "collect at 1", "publish demo.1@2", "publish demo.1@3"]
    assert services.events == [on_policy, ahead][staleness]
    rows = read_rows(run.directory / "metrics.jsonl")
    assert [row["rollout/staleness_mean"] for row in rows] == [[0, 0, 0], [0, 1, 1]][staleness]


class Killed(BaseException):
    """The process dies here."""


def final_weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.directory / "model" / "model.safetensors")


def comparable(run: Run) -> list[dict[str, float]]:
    rows = read_rows(run.directory / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time", "eps", "trainer/"))} for row in rows]


@pytest.mark.parametrize("death", [1, 2, 3])
def test_a_killed_trainer_goes_on_from_its_checkpoint_bit_by_bit(make, death: int) -> None:
    loop, _, whole, _ = make("whole")
    go(loop, whole)

    loop, services, run, _ = make("killed")

    def die() -> None:
        assert services.image is not None
        if services.image.version.step == death:
            raise Killed

    services.before_collect = die
    with pytest.raises(Killed):
        go(loop, run)

    loop, services, run, _ = make("killed", run_id="demo.2")
    result = go(loop, run)
    saved = death - death % 2
    assert services.events[0] == f"publish demo.2@{saved}"
    assert (result.steps, result.stopped) == (4, False)
    assert comparable(run) == comparable(whole)
    ours, theirs = final_weights(run), final_weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_cancelled_job_saves_and_can_go_on(make) -> None:
    asked = threading.Event()
    loop, services, run, _ = make(stop=asked.is_set, save_every_steps=100)
    steps = iter([None, None, asked.set])
    services.before_collect = lambda: (next(steps) or (lambda: None))()
    result = go(loop, run)
    assert (result.steps, result.stopped, result.model_directory) == (3, True, None)
    assert not (run.directory / "model").exists()
    loop, services, run, _ = make(run_id="demo.2")
    assert go(loop, run).steps == 4
    assert services.events[0] == "publish demo.2@3"


def test_a_wait_says_what_it_waits_for_and_can_be_cancelled(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo_loop, "_POLL_SECONDS", 0.01)
    asked = threading.Event()
    loop, services, run, listener = make(stop=asked.is_set)
    services.hang = True
    original = listener.on_progress

    def listen(step: int, total_steps: int, message: str) -> None:
        original(step, total_steps, message)
        if "nowhere" in message:
            asked.set()

    listener.on_progress = listen
    result = go(loop, run)
    assert (result.steps, result.stopped) == (0, True)
    assert "waiting for policy at nowhere: 3 s" in listener.messages


def test_dropped_samples_are_counted_and_too_many_end_the_job(make) -> None:
    loop, services, run, _ = make(total_steps=1)
    services.num_drops = 5
    result = go(loop, run)
    assert (result.metrics["rollout/dropped"], result.metrics["episode"]) == (5, 11)
    loop, services, run, _ = make("other", total_steps=1)
    services.num_drops = 9
    with pytest.raises(
        RuntimeError, match=r"9 of 16 samples were dropped.*9 by reward at r:1 \(INTERNAL\); first: sample 0.0"
    ):
        go(loop, run)


def test_held_out_prompts_are_evaluated(make, write_rows) -> None:
    file = write_rows([{"prompt": "Human : w1"}], "held_out.jsonl")
    evaluation = {"prompts": {"files": [file]}, "every_steps": 2, "num_prompts": 4}
    loop, _, run, _ = make(total_steps=3, evaluation=evaluation)
    go(loop, run)
    rows = read_rows(run.directory / "metrics.jsonl")
    assert ["eval/scores" in row for row in rows] == [False, True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rte": 1}, "learning_rte"),
        ({"num_minibatches": 99}, "num_minibatches is 99, must be at most the 16"),
        ({"missing_eos_penalty": 1.0}, "missing_eos_penalty must be left out"),
        ({"kl": {"place": "loss", "estimator": "k1"}}, "must be k2 or k3"),
        ({"kl": {"coefficient": 0, "target": 1}}, "coefficient is 0"),
        ({"sampling": {"temperature": 0}}, "temperature"),
        ({"services": {"policies": []}}, "policies"),
        ({"tokenizer": None}, "tokenizer is missing"),
    ],
)
def test_bad_settings_are_named(make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)
