"""The PPO job: rollouts, update, push, again.

Order of a step with `max_staleness` 0, and with 1 (the generation of the next batch overlaps the update):

    0:  [collect k][update k][push k+1][collect k+1]...
    1:  [collect k][update k        ][push k+1][update k+1]...
                   [collect k+1 ..............]

With 1, tokens of batch k+1 come from weights k until the push, which switches running requests without aborting
them, and from weights k+1 after it; every token carries the log-prob under the weights that drew it, so the
truncated importance weight corrects each one by itself. Overlap is the default: on separate machines it hides the
shorter of generation and update completely.

Resume: a checkpoint holds models, optimizers, random states, the KL controller and the counters as of the end of a
step; prompts are a function of seed and step. The first act of every start is to publish the weights, under a run
id of its own ("demo.2").
"""

import logging
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steersman.trainer.algorithm.kl import AdaptiveKLController, FixedKLController, KLController
from steersman.trainer.checkpoint.models import (
    load_actor,
    load_scalar_head,
    load_tokenizer,
    load_weights,
    require_savable,
    save_model,
    write_model,
)
from steersman.trainer.checkpoint.state import random_state, restore_random_state
from steersman.trainer.checkpoint.store import CheckpointStore
from steersman.trainer.data.encode import Encoder
from steersman.trainer.data.load import load_prompts
from steersman.trainer.data.order import EpochOrder
from steersman.trainer.data.settings import DataSettings
from steersman.trainer.rollout.types import Prompt, Rollout, RolloutBatch, describe_drops
from steersman.trainer.stages.placement import place
from steersman.trainer.stages.ppo_config import PpoConfig
from steersman.trainer.stages.ppo_learner import PpoLearner
from steersman.trainer.stages.ppo_services import GrpcServices, Services
from steersman.trainer.stages.run import Run
from steersman.trainer.weights.image import WeightImage
from steersman.trainer.weights.publisher import PublishReport, next_attempt
from steersman.wire.identity import WeightVersion

_log = logging.getLogger(__name__)
T = TypeVar("T")
# How often a wait looks up: to report what it waits for, and to notice a cancellation.
_POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class PpoResult:
    """How the job ended. `model_directory` is None if it was stopped before its last step."""

    steps: int
    stopped: bool
    model_directory: Path | None
    metrics: dict[str, float] = field(default_factory=dict)


class Stopped(Exception):
    """The job was cancelled while it waited."""


def run_ppo(config: PpoConfig, run: Run) -> PpoResult:
    """Trains to the end, or until `run.stop_requested()`; goes on from the last checkpoint in the run folder if
    there is one.

    The final model is at `run.directory / "model"`. Raises CheckpointError, DataError or ValueError for bad
    settings, GaveUp when a service stayed away too long, WeightsRefused when a policy serves another model.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    attempt = next_attempt(run.directory)
    revision = None if config.tokenizer else config.actor.revision
    tokenizer = load_tokenizer(config.tokenizer or str(config.actor.path), revision=revision)
    actor, critic = load_models(config, tokenizer)
    require_savable(actor, tokenizer)
    learner = PpoLearner(actor, critic, config)
    run_id = f"{run.run_id}.{attempt}"
    with GrpcServices(config, run_id=run_id, tokenizer=tokenizer) as services:
        checking = services.check()
        loop = PpoLoop(config, run, learner, services, tokenizer=tokenizer, run_id=run_id)
        loop.wait_for(checking, "asking the services for their models")
        return loop.run()


def load_models(config: PpoConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Actor and critic on the device of the settings."""
    placement = place(config.device, config.dtype)
    actor = load_actor(config.actor, seed=config.seed, tokenizer=tokenizer)
    critic = load_scalar_head(config.critic or config.actor, seed=config.seed, tokenizer=tokenizer)
    for model in (actor, critic):
        placement.move(model, fast_linear=config.fast_linear)
    return actor, critic


class PromptStream:
    """The prompts of each step: a function of the seed and the step."""

    def __init__(
        self,
        data: DataSettings,
        config: PpoConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        salt: int = 0,
    ) -> None:
        records, _ = load_prompts(data)
        encoder = Encoder(
            tokenizer=tokenizer,
            max_prompt_tokens=config.max_prompt_tokens,
            max_response_tokens=config.sampling.max_tokens,
            transcript=config.transcript,
        )
        self._ids = encoder.prompts([record.prompt for record in records])
        self._texts = [record.prompt if isinstance(record.prompt, str) else "" for record in records]
        self._order = EpochOrder(len(records), batch_size=batch_size, seed=config.seed + salt)

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of `step`, counted from 0."""
        return [
            Prompt(index=index, token_ids=np.array(self._ids[record], np.int32), text=self._texts[record])
            for index, record in enumerate(self._order.batch(step))
        ]


class PpoLoop:
    """The loop over steps, apart from where models and services come from."""

    def __init__(
        self,
        config: PpoConfig,
        run: Run,
        learner: PpoLearner,
        services: Services,
        *,
        tokenizer: PreTrainedTokenizerBase,
        run_id: str,
    ) -> None:
        self._config = config
        self._run = run
        self._learner = learner
        self._services = services
        self._tokenizer = tokenizer
        self._run_id = run_id
        self._prompts = PromptStream(config.prompts, config, tokenizer, batch_size=config.prompts_per_step)
        evaluation = config.evaluation
        self._held_out = (
            PromptStream(evaluation.prompts, config, tokenizer, batch_size=evaluation.num_prompts)
            if evaluation is not None
            else None
        )
        self._store = CheckpointStore(run.directory / "checkpoints", keep=config.keep_checkpoints)
        self._kl = _kl_controller(config)
        self._step = 0
        self._saved_step: int | None = None
        self._num_samples = 0
        self._num_dropped = 0
        self._seconds: dict[str, float] = {}
        self._metrics: dict[str, float] = {}

    def run(self) -> PpoResult:
        """All steps that are left."""
        config = self._config
        torch.manual_seed(config.seed)
        self._resume()
        try:
            self._publish()
            pending: Future[RolloutBatch] | None = None
            while self._step < config.total_steps:
                if self._run.stop_requested():
                    raise Stopped
                pending = self._train_step(pending)
        except Stopped:
            self._checkpoint()
            return PpoResult(steps=self._step, stopped=True, model_directory=None, metrics=self._metrics)
        self._checkpoint()
        target = self._run.directory / "model"
        save_model(target, self._learner.actor, self._tokenizer, metadata={"step": self._step})
        return PpoResult(steps=self._step, stopped=False, model_directory=target, metrics=self._metrics)

    def wait_for(self, future: "Future[T]", what: str) -> T:
        """The result, saying meanwhile what is waited for. Stopped if the job is cancelled first; the work is then
        cancelled.
        """
        while True:
            try:
                return future.result(timeout=_POLL_SECONDS)
            except FutureTimeoutError:
                if future.done():
                    raise
            if self._run.stop_requested():
                future.cancel()
                wait([future], timeout=_POLL_SECONDS)
                raise Stopped
            self._progress(self._services.waiting() or what)

    def _train_step(self, pending: "Future[RolloutBatch] | None") -> "Future[RolloutBatch] | None":
        """One batch; gives the next one, already under way if staleness allows or if there is none to wait for."""
        config, step = self._config, self._step
        self._seconds = {}
        started = time.monotonic()
        ahead: Future[RolloutBatch] | None = None
        with self._timed("rollout"):
            batch = self.wait_for(pending or self._services.collect(self._prompts.batch(step)), "generating")
        if config.max_staleness > 0 and step + 1 < config.total_steps:
            ahead = self._services.collect(self._prompts.batch(step + 1))
        try:
            self._require_enough(batch)
            self._progress("updating")
            with self._timed("update"):
                metrics = self._learner.update(batch.rollouts, step=step, kl_coef=self._kl.coefficient)
            self._kl.update(metrics["objective/kl"], len(batch.rollouts))
            self._step = step + 1
            self._num_samples += len(batch.rollouts)
            self._num_dropped += len(batch.drops)
            report = self._publish()
            evaluated = self._evaluate()
        except BaseException:
            if ahead is not None:
                ahead.cancel()
            raise
        metrics |= self._rollout_metrics(batch, report) | evaluated
        metrics |= self._time_metrics(time.monotonic() - started, len(batch.rollouts))
        self._metrics = metrics
        self._run.log(self._step, metrics)
        self._log_samples(batch.rollouts)
        if self._step % config.save_every_steps == 0:
            self._checkpoint()
        self._progress(f"reward {metrics['objective/scores']:.3f}, KL {metrics['objective/kl']:.3f}")
        return ahead

    def _publish(self) -> PublishReport:
        with self._timed("push"):
            image = WeightImage.of(self._learner.actor, WeightVersion(run_id=self._run_id, step=self._step))
            return self.wait_for(self._services.publish(image), "pushing weights")

    def _evaluate(self) -> dict[str, float]:
        """Mean score, KL and length on held-out prompts, always the same ones; empty when it is not due."""
        settings = self._config.evaluation
        if self._held_out is None or settings is None:
            return {}
        if self._step % settings.every_steps and self._step != self._config.total_steps:
            return {}
        with self._timed("evaluation"):
            batch = self.wait_for(self._services.collect(self._held_out.batch(0)), "evaluating")
        self._require_enough(batch)
        rollouts = batch.rollouts
        return {
            "eval/scores": float(np.mean([rollout.score for rollout in rollouts])),
            "eval/kl": float(np.mean([np.sum(r.behaviour_logprobs - r.ref_logprobs) for r in rollouts])),
            "eval/response_length_mean": float(np.mean([len(rollout.response_ids) for rollout in rollouts])),
        }

    def _require_enough(self, batch: RolloutBatch) -> None:
        num_samples = len(batch.rollouts) + len(batch.drops)
        if not batch.rollouts or len(batch.drops) > self._config.max_dropped_share * num_samples:
            raise RuntimeError(
                f"{len(batch.drops)} of {num_samples} samples were dropped, allowed is a share of "
                f"{self._config.max_dropped_share} (max_dropped_share): {describe_drops(batch.drops)}"
            )

    def _rollout_metrics(self, batch: RolloutBatch, report: PublishReport) -> dict[str, float]:
        trained = self._step - 1
        return {
            "episode": float(self._num_samples),
            "rollout/dropped": float(len(batch.drops)),
            "rollout/dropped_total": float(self._num_dropped),
            "rollout/resent": float(batch.num_resent),
            "rollout/seconds": batch.seconds,
            "rollout/staleness_mean": float(np.mean([trained - rollout.token_steps.min() for rollout in batch.rollouts])),
            "push/bytes": float(report.pushed_bytes),
            "push/delta_share": report.delta_share,
            "push/pause_seconds": report.pause_seconds,
            "push/replicas_behind": float(len(report.failures)),
        }

    def _time_metrics(self, step_seconds: float, num_samples: int) -> dict[str, float]:
        """Seconds by phase. Busy is what the main thread computed; it waits in rollout, push and evaluation."""
        timed = {f"time/{name}_seconds": seconds for name, seconds in self._seconds.items()}
        return timed | {
            "time/step_seconds": step_seconds,
            "trainer/busy_share": self._seconds.get("update", 0.0) / step_seconds,
            "eps": num_samples / step_seconds,
        }

    def _log_samples(self, rollouts: tuple[Rollout, ...]) -> None:
        count = min(self._config.samples_logged, len(rollouts))
        chosen = random.Random(f"{self._config.seed}/{self._step}/samples").sample(rollouts, count)
        self._run.samples(
            {
                "step": self._step,
                "prompt": rollout.prompt.text or self._tokenizer.decode(rollout.prompt.token_ids.tolist()),
                "response": self._tokenizer.decode(rollout.response_ids.tolist()),
                "score": rollout.score,
                "kl": float(np.sum(rollout.behaviour_logprobs - rollout.ref_logprobs)),
                "finish_reason": rollout.finish_reason.value,
            }
            for rollout in chosen
        )

    def _checkpoint(self) -> None:
        if self._saved_step == self._step:
            return
        learner = self._learner

        def write_files(directory: Path) -> None:
            for name, model in (("actor", learner.actor), ("critic", learner.critic)):
                (directory / name).mkdir()
                write_model(directory / name, model)

        state: dict[str, Any] = {
            "learner": learner.state_dict(),
            "random": random_state(),
            "kl": self._kl.state_dict(),
            "num_samples": self._num_samples,
            "num_dropped": self._num_dropped,
        }
        with self._timed("checkpoint"):
            self._store.save(self._step, state=state, write_files=write_files)
        self._saved_step = self._step

    def _resume(self) -> None:
        checkpoint = self._store.latest()
        if checkpoint is None:
            self._run.rewind(0)
            return
        state = checkpoint.state()
        load_weights(self._learner.actor, checkpoint.directory / "actor")
        load_weights(self._learner.critic, checkpoint.directory / "critic")
        self._learner.load_state_dict(state["learner"])
        restore_random_state(state["random"])
        self._kl.load_state_dict(state["kl"])
        self._num_samples, self._num_dropped = state["num_samples"], state["num_dropped"]
        self._step = self._saved_step = checkpoint.step
        self._run.rewind(checkpoint.step)
        _log.info("resumed from step %d", checkpoint.step)

    def _progress(self, message: str) -> None:
        self._run.progress(self._step, self._config.total_steps, message)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - started


def _kl_controller(config: PpoConfig) -> KLController:
    settings = config.kl
    if settings.target is None:
        return FixedKLController(coefficient=settings.coefficient)
    return AdaptiveKLController(coefficient=settings.coefficient, target=settings.target, horizon=settings.horizon)


__all__ = ["PpoLoop", "PpoResult", "PromptStream", "Stopped", "load_models", "run_ppo"]
