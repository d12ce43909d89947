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
from steersman.trainer.weights.report import PublishReport

LIKED = 7  # the token that the reward counts
MAX_TOKENS = 6


class FakeServices:
    """Draws with the published weights, scores by the share of one token; all of it depends on the steps alone.

    The first `num_at_once` tokens are drawn when a batch is begun, the others when somebody waits for it, by the
    weights of that moment: as late as can be.
    """

    def __init__(self, frozen: PreTrainedModel) -> None:
        self.frozen = frozen
        self.policy = load_copy(frozen)
        self.events: list[str] = []
        self.image: WeightImage | None = None
        self.before_result: Callable[[], None] = lambda: None
        self.num_drops = 0
        self.num_at_once = MAX_TOKENS
        self.hang = False
        self.late_pushes = False
        self.failing_push: int | None = None
        self.begun: list[Future[RolloutBatch]] = []
        self.prompts: dict[int, list[str]] = {}

    def publish(self, image: WeightImage) -> "Future[PublishReport]":
        self.events.append(f"publish {image.version}")
        self.image = image
        self.policy.load_state_dict(image._tensors)
        report = PublishReport(seconds=0.0, pushed_bytes=100 + image.version.step)
        return LatePush(self, report, image.version.step) if self.late_pushes else done(report)

    def collect(self, prompts: Sequence[Prompt], *, oldest_step: int, priority: int = 0) -> "Future[RolloutBatch]":
        assert self.image is not None, "prompts before the first weights"
        assert self.image.version.step >= oldest_step, "prompts before weights that may draw"
        self.events.append(f"collect {priority} at {self.image.version.step}")
        self.prompts[priority] = [prompt.text for prompt in prompts]
        self.begun.append(Future() if self.hang else LateBatch(self, prompts, seed=self.image.version.step))
        return self.begun[-1]

    def waiting(self) -> str:
        return "waiting for policy at nowhere: 3 s" if self.hang else ""

    def close(self) -> None:
        self.events.append("close")


class LatePush(Future):
    """A publication of `FakeServices` that ends, or fails, when somebody waits for it."""

    def __init__(self, services: FakeServices, report: PublishReport, step: int) -> None:
        super().__init__()
        self.services, self.report, self.step = services, report, step

    def result(self, timeout: float | None = None) -> PublishReport:
        if not self.done():
            self.services.events.append(f"arrived {self.step}")
            if self.step == self.services.failing_push:
                self.set_exception(RuntimeError("no replica takes the weights"))
            else:
                self.set_result(self.report)
        return super().result(timeout)


class LateBatch(Future):
    """A batch of `FakeServices`, complete once somebody waits for it."""

    def __init__(self, services: FakeServices, prompts: Sequence[Prompt], *, seed: int) -> None:
        super().__init__()
        self.services = services
        self.all_prompts = prompts
        self.generator = torch.Generator().manual_seed(seed)
        self.ids = torch.stack([torch.from_numpy(prompt.token_ids).long() for prompt in prompts])  # all of one length
        self.first = self.ids.shape[1]
        self.logprobs: list[torch.Tensor] = []
        self.spans: list[VersionSpan] = []
        self.draw(services.num_at_once)

    def result(self, timeout: float | None = None) -> RolloutBatch:
        if not self.done():
            self.services.before_result()
            self.draw(MAX_TOKENS - len(self.logprobs))
            rollouts, count = self.rollouts(), self.services.num_drops
            drops = tuple(
                Drop(key=rollout.key, service="reward at r:1", reason="gone", cause="INTERNAL")
                for rollout in rollouts[:count]
            )
            self.set_result(RolloutBatch(rollouts=tuple(rollouts[count:]), drops=drops))
        return super().result(timeout)

    @torch.no_grad()
    def draw(self, count: int) -> None:
        assert self.services.image is not None
        start = len(self.logprobs)
        for _ in range(count):
            distribution = torch.log_softmax(self.services.policy(self.ids).logits[:, -1], -1)
            token = torch.multinomial(distribution.exp(), 1, generator=self.generator)
            self.logprobs.append(distribution.gather(1, token))
            self.ids = torch.cat([self.ids, token], 1)
        if count:
            self.spans.append(VersionSpan(version=self.services.image.version, start=start, end=start + count))

    @torch.no_grad()
    def rollouts(self) -> list[Rollout]:
        responses = self.ids[:, self.first :]
        reference = torch.log_softmax(self.services.frozen(self.ids).logits[:, self.first - 1 : -1], -1)
        reference = reference.gather(2, responses[:, :, None])[:, :, 0]
        behaviour = torch.cat(self.logprobs, 1)
        return [
            Rollout(
                prompt=prompt,
                sample=0,
                response_ids=responses[row].numpy().astype(np.int32),
                behaviour_logprobs=behaviour[row].numpy(),
                ref_logprobs=reference[row].numpy(),
                weight_versions=tuple(self.spans),
                score=float((responses[row] == LIKED).float().mean()),
                finish_reason=FinishReason.LENGTH,
            )
            for row, prompt in enumerate(self.all_prompts)
        ]


class WatchedLearner(PpoLearner):
    """Writes down each update."""

    events: list[str]

    def update(self, rollouts: Sequence[Rollout], *, step: int, kl_coef: float) -> dict[str, float]:
        self.events.append(f"update {step}")
        return super().update(rollouts, step=step, kl_coef=kl_coef)


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
        actor, critic = (opened.model for opened in load_models(config, tokenizer))
        services = FakeServices(load_actor(config.actor, seed=config.seed, tokenizer=tokenizer))
        listener = Listener()
        run = Run(tmp_path / folder, run_id="demo", listener=listener, stop_requested=stop)
        learner = WatchedLearner(actor, critic, config)
        learner.events = services.events
        loop = PpoLoop(config, run, learner, services, tokenizer=tokenizer, run_id=run_id)
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


ORDER = {
    0: """publish demo.1@0, collect 0 at 0, update 0, publish demo.1@1, collect 1 at 1, update 1, publish demo.1@2,
    collect 2 at 2, update 2, publish demo.1@3, collect 3 at 3, update 3, publish demo.1@4, collect 4 at 4, update 4,
    publish demo.1@5""",
    1: """publish demo.1@0, collect 0 at 0, collect 1 at 0, update 0, publish demo.1@1, collect 2 at 1, update 1,
    publish demo.1@2, collect 3 at 2, update 2, publish demo.1@3, collect 4 at 3, update 3, publish demo.1@4, update 4,
    publish demo.1@5""",
    3: """publish demo.1@0, collect 0 at 0, collect 1 at 0, collect 2 at 0, collect 3 at 0, update 0, publish demo.1@1,
    collect 4 at 1, update 1, publish demo.1@2, update 2, publish demo.1@3, update 3, publish demo.1@4, update 4,
    publish demo.1@5""",
}


@pytest.mark.parametrize("staleness", ORDER)
def test_batches_are_begun_as_early_as_staleness_allows_and_trained_in_order(make, staleness: int) -> None:
    loop, services, run, _ = make(total_steps=5, max_staleness=staleness)
    go(loop, run)
    assert services.events == [" ".join(event.split()) for event in ORDER[staleness].split(",")]
    rows = read_rows(run.directory / "metrics.jsonl")
    ages = [min(step, staleness) for step in range(5)]
    assert [row["rollout/staleness_mean"] for row in rows] == ages
    assert [row["rollout/staleness_max"] for row in rows] == ages


LATE_ORDER = {
    0: """publish demo.1@0, arrived 0, collect 0 at 0, update 0, publish demo.1@1, arrived 1, collect 1 at 1, update 1,
    publish demo.1@2, arrived 2, collect 2 at 2, update 2, publish demo.1@3, arrived 3""",
    1: """publish demo.1@0, arrived 0, collect 0 at 0, collect 1 at 0, update 0, publish demo.1@1, collect 2 at 1,
    update 1, arrived 1, publish demo.1@2, update 2, arrived 2, publish demo.1@3, arrived 3""",
}


@pytest.mark.parametrize("staleness", LATE_ORDER)
def test_weights_travel_beside_the_next_update_where_its_batch_may_be_older(make, staleness: int) -> None:
    loop, services, run, _ = make(total_steps=3, max_staleness=staleness)
    services.late_pushes = True
    go(loop, run)
    assert services.events == [" ".join(event.split()) for event in LATE_ORDER[staleness].split(",")]
    # A row tells of the newest push that has ended.
    ended = [row["push/bytes"] for row in read_rows(run.directory / "metrics.jsonl")]
    assert ended == [[101, 102, 103], [100, 101, 102]][staleness]


def test_an_evaluation_waits_for_the_weights_that_it_is_of(make, write_rows) -> None:
    evaluation = {"prompts": {"files": [write_rows([{"prompt": "Human : w1"}], "held_out.jsonl")]}, "num_prompts": 4}
    loop, services, run, _ = make(total_steps=2, max_staleness=1, evaluation=evaluation | {"every_steps": 1})
    services.late_pushes = True
    go(loop, run)
    assert services.events[-4:] == ["update 1", "publish demo.1@2", "arrived 2", "collect 0 at 2"]


@pytest.mark.parametrize(("staleness", "num_updates"), [(0, 2), (1, 3)])
def test_a_push_that_fails_ends_the_job(make, staleness: int, num_updates: int) -> None:
    loop, services, run, _ = make(total_steps=8, max_staleness=staleness)
    services.late_pushes, services.failing_push = True, 2
    with pytest.raises(RuntimeError, match="no replica takes the weights"):
        go(loop, run)
    assert sum("update" in event for event in services.events) == num_updates
    assert services.events[-1] == "arrived 2"
    assert all(future.cancelled() for future in services.begun[num_updates:])


def test_a_response_begun_by_old_weights_goes_on_under_new_ones_and_each_token_is_corrected_for_its_own(make) -> None:
    loop, services, run, _ = make(total_steps=6, max_staleness=2)
    services.num_at_once = MAX_TOKENS // 2
    go(loop, run)
    rows = read_rows(run.directory / "metrics.jsonl")
    ages = [min(step, 2) for step in range(6)]
    assert [row["rollout/staleness_max"] for row in rows] == ages
    assert [row["rollout/staleness_mean"] for row in rows] == [age / 2 for age in ages]
    assert [row["rollout/stale_token_share"] for row in rows] == [0.5 if age else 0.0 for age in ages]
    assert all(row["rollout/token_share_age_0"] == (0.5 if age else 1.0) for row, age in zip(rows, ages, strict=True))
    assert ["mismatch/kl_on_policy" in row for row in rows] == [age == 0 for age in ages]
    for row, age in zip(rows, ages, strict=True):
        # The same model drew and trained: without age there is only arithmetic between them.
        assert row["mismatch/logprob_abs_max_age_0"] < 1e-4
        assert row["mismatch/ratio_mean_age_0"] == pytest.approx(1.0, abs=1e-5)
        if age:
            assert row[f"mismatch/logprob_abs_mean_age_{age}"] > 1e-3
            assert row["mismatch/logprob_abs_max"] == row[f"mismatch/logprob_abs_max_age_{age}"]
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"]


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

    services.before_result = die
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


def test_with_staleness_a_killed_trainer_trains_on_the_same_prompts_in_the_same_order(make) -> None:
    settings = {"total_steps": 8, "max_staleness": 2, "save_every_steps": 3}
    loop, services, whole, _ = make("whole", **settings)
    go(loop, whole)
    prompts = services.prompts

    loop, services, run, _ = make("killed", **settings)
    calls = iter(range(8))

    def die() -> None:
        if next(calls) == 4:  # batches 5 and 6 are under way
            raise Killed

    services.before_result = die
    with pytest.raises(Killed):
        go(loop, run)
    assert services.events[-1] == "collect 6 at 4"
    assert all(future.cancelled() for future in services.begun[5:])

    loop, services, run, _ = make("killed", run_id="demo.2", **settings)
    go(loop, run)
    assert services.events[:5] == [
        "publish demo.2@3",
        *(f"collect {step} at 3" for step in (3, 4, 5)),  # what was under way is begun again
        "update 3",
    ]
    assert [event for event in services.events if "update" in event] == [f"update {step}" for step in range(3, 8)]
    assert services.prompts == {step: prompts[step] for step in range(3, 8)}
    rows = read_rows(run.directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["episode"] for row in rows] == [16 * step for step in range(1, 9)]
    assert [row["rollout/staleness_max"] for row in rows] == [0, 1, 2, 0, 1, 2, 2, 2]


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_a_job_that_ends_early_leaves_nothing_under_way(make, end: str) -> None:
    asked = threading.Event()
    loop, services, run, _ = make(stop=asked.is_set, max_staleness=3, total_steps=8)
    calls = iter([lambda: None, asked.set if end == "cancelled" else lambda: setattr(services, "num_drops", 16)])
    services.before_result = lambda: next(calls)()
    if end == "cancelled":
        assert go(loop, run).steps == 2
    else:
        with pytest.raises(RuntimeError, match="16 of 16 samples were dropped"):
            go(loop, run)
    assert len(services.begun) == (6 if end == "cancelled" else 5)
    assert all(future.cancelled() for future in services.begun[2:])


def test_a_cancelled_job_saves_and_can_go_on(make) -> None:
    asked = threading.Event()
    loop, services, run, _ = make(stop=asked.is_set, save_every_steps=100)
    steps = iter([None, None, asked.set])
    services.before_result = lambda: (next(steps) or (lambda: None))()
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
