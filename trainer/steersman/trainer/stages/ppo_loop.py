"""The PPO job: rollouts, update, push, again.

The loop trains on batch after batch, in order; which ones are drawn meanwhile is the business of `ppo_pipeline`. With
`max_staleness` 0 generation and update take turns. With more, batches to come are drawn while the models are updated,
by weights up to so many steps old; every token carries the log-prob under the weights that drew it, so the truncated
importance weight corrects each one by itself. On separate machines that hides the shorter of generation and update.
Weights then travel beside the next update too; a push that fails ends the job where the next one would begin.

Resume: a checkpoint holds models, optimizers, random states, the KL controller and the counters as of the end of a
step; prompts are a function of seed and step. The first act of every start is to publish the weights, under a run
id of its own ("demo.2"). With `max_staleness` 0 a resumed run is the uninterrupted one to the bit, given the same
samples. With more, it trains on the same prompts in the same order, but batches that were under way or ready are
drawn again, by the weights of the checkpoint: their first tokens are younger than they would have been.
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
from transformers import PreTrainedTokenizerBase

from steersman.trainer.algorithm.kl import AdaptiveKLController, FixedKLController, KLController
from steersman.trainer.checkpoint.models import (
    checkpoint_folder,
    load_tokenizer,
    open_actor,
    open_scalar_head,
    require_savable,
    save_model,
    shift_scores,
)
from steersman.trainer.checkpoint.parts import Opened
from steersman.trainer.checkpoint.state import random_state, restore_random_state
from steersman.trainer.checkpoint.store import CheckpointStore
from steersman.trainer.distributed.world import World
from steersman.trainer.rollout.types import Rollout, RolloutBatch, describe_drops
from steersman.trainer.stages import reward_normalization
from steersman.trainer.stages.placement import place
from steersman.trainer.stages.ppo_config import PpoConfig
from steersman.trainer.stages.ppo_learner import Learner, PpoLearner
from steersman.trainer.stages.ppo_pipeline import RolloutPipeline, require_fresh
from steersman.trainer.stages.ppo_prompts import PromptStream
from steersman.trainer.stages.ppo_services import GrpcServices, Services, weight_connections
from steersman.trainer.stages.run import Run
from steersman.trainer.weights.attempt import next_attempt
from steersman.trainer.weights.report import PublishReport
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
    On a rank that is not the lead, all that is the lead's business.
    """
    run.world.watch(config.rank_patience_seconds)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    tokenizer = load_tokenizer(
        config.tokenizer or str(config.actor.path), revision=None if config.tokenizer else config.actor.revision
    )
    learner = load_learner(config, tokenizer, run.world)
    if run.world.size == 1:
        return _run(config, run, tokenizer, learner)
    # Not before: one process does without torch.distributed.
    from steersman.trainer.stages.ppo_ranks import LeadLearner, follow
    from steersman.trainer.weights.sharded import ShardedWeights

    weights = ShardedWeights(weight_connections(config.services))
    if not run.world.is_lead:
        try:
            num_updates = follow(learner, run.world, weights, stop_requested=run.stop_requested)
        finally:
            weights.close()
        return PpoResult(steps=num_updates, stopped=False, model_directory=None)
    lead = LeadLearner(learner, run.world, weights)
    try:
        return _run(config, run, tokenizer, lead)
    finally:
        lead.close()


def load_learner(config: PpoConfig, tokenizer: PreTrainedTokenizerBase, world: World) -> PpoLearner:
    """The learner with its models, on the device of the settings or sharded over the ranks."""
    actor, critic = load_models(config, tokenizer, in_parts=world.size > 1)
    require_savable(actor.model, tokenizer)
    placement = place(world.device(config.device), config.dtype)
    return PpoLearner(
        actor.model,
        critic.model,
        config,
        world=world,
        actor_scope=placement.settle(actor.model, world, actor.files, fast_linear=config.fast_linear),
        critic_scope=placement.settle(critic.model, world, critic.files, fast_linear=config.fast_linear),
    )


def load_models(
    config: PpoConfig, tokenizer: PreTrainedTokenizerBase, *, in_parts: bool = False
) -> tuple[Opened, Opened]:
    """Actor and critic, on the CPU; `in_parts`, their weights are still in their files where that can be."""
    start = config.critic or config.actor
    actor = open_actor(config.actor, seed=config.seed, tokenizer=tokenizer, in_parts=in_parts)
    critic = open_scalar_head(start, seed=config.seed, tokenizer=tokenizer, in_parts=in_parts)
    folder = checkpoint_folder(config.critic) if config.critic is not None else None
    if folder is not None and config.critic_scale == "served":
        scale = reward_normalization.stored(folder, critic.model.config)
        critic = critic if scale is None else shift_scores(critic, mean=scale[0], std=scale[1])
    return actor, critic


def _run(config: PpoConfig, run: Run, tokenizer: PreTrainedTokenizerBase, learner: Learner) -> PpoResult:
    run_id = f"{run.run_id}.{next_attempt(run.directory)}"
    with GrpcServices(config, run_id=run_id, tokenizer=tokenizer) as services:
        checking = services.check()
        loop = PpoLoop(config, run, learner, services, tokenizer=tokenizer, run_id=run_id)
        loop.wait_for(checking, "asking the services for their models")
        return loop.run()


class PpoLoop:
    """The loop over steps, apart from where models and services come from."""

    def __init__(
        self,
        config: PpoConfig,
        run: Run,
        learner: Learner,
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
        self._pushing: Future[PublishReport] | None = None
        self._last_push = PublishReport(seconds=0.0)
        self._seconds: dict[str, float] = {}
        self._metrics: dict[str, float] = {}

    def run(self) -> PpoResult:
        """All steps that are left."""
        config = self._config
        torch.manual_seed(config.seed)
        self._resume()
        try:
            with self._pipeline() as pipeline:
                self._push()
                self._await_push()
                pipeline.published(self._step)
                while self._step < config.total_steps:
                    if self._run.stop_requested():
                        raise Stopped
                    self._train_step(pipeline)
                self._await_push()
        except Stopped:
            self._checkpoint()
            return PpoResult(steps=self._step, stopped=True, model_directory=None, metrics=self._metrics)
        self._checkpoint()
        target = self._run.directory / "model"
        actor = self._learner.whole_actor()
        assert actor is not None, "the loop runs on the lead"
        with self._run.world.long("writing the model"):
            save_model(target, actor, self._tokenizer, metadata={"step": self._step})
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

    def _pipeline(self) -> RolloutPipeline:
        def begin(step: int, oldest_step: int) -> "Future[RolloutBatch]":
            # The step is the priority too: what is trained on first is drawn first.
            return self._services.collect(self._prompts.batch(step), oldest_step=oldest_step, priority=step)

        return RolloutPipeline(
            begin,
            first_step=self._step,
            total_steps=self._config.total_steps,
            max_staleness=self._config.max_staleness,
        )

    def _train_step(self, pipeline: RolloutPipeline) -> None:
        """Trains on the next batch, publishes what came of it, and begins the batches that this allows."""
        config, step = self._config, self._step
        self._seconds = {}
        started = time.monotonic()
        num_ready = pipeline.num_ready
        with self._timed("rollout"):
            batch = self.wait_for(pipeline.take(), "generating")
        self._require_enough(batch)
        require_fresh(batch, run_id=self._run_id, oldest_step=pipeline.oldest_step(step), step=step)
        self._progress("updating")
        with self._timed("update"):
            metrics = self._learner.update(batch.rollouts, step=step, kl_coef=self._kl.coefficient)
        self._kl.update(metrics["objective/kl"], len(batch.rollouts))
        self._step = step + 1
        self._num_samples += len(batch.rollouts)
        self._num_dropped += len(batch.drops)
        self._push()
        if config.max_staleness == 0:  # there is nothing to do meanwhile
            self._await_push()
        # Before more is begun: the loop waits for the evaluation.
        evaluated = self._evaluate()
        pipeline.published(self._step)
        metrics |= self._rollout_metrics(batch) | evaluated
        metrics["rollout/ready_batches"] = float(num_ready)
        metrics |= self._time_metrics(time.monotonic() - started, len(batch.rollouts))
        self._metrics = metrics
        self._run.log(self._step, metrics)
        self._log_samples(batch.rollouts)
        if self._step % config.save_every_steps == 0:
            self._checkpoint()
        self._progress(f"reward {metrics['objective/scores']:.3f}, KL {metrics['objective/kl']:.3f}")

    def _push(self) -> None:
        """Begins to push the weights as they are, once the push before has ended."""
        self._await_push()
        with self._timed("push"):
            image = self._learner.image(WeightVersion(run_id=self._run_id, step=self._step))
            assert image is not None, "the loop runs on the lead"
            self._pushing = self._services.publish(image)

    def _await_push(self) -> None:
        if self._pushing is not None:
            with self._timed("push"):
                self._last_push = self.wait_for(self._pushing, "pushing weights")
            self._pushing = None

    def _evaluate(self) -> dict[str, float]:
        """Mean score, KL and length on held-out prompts, always the same ones; empty when it is not due."""
        settings = self._config.evaluation
        if self._held_out is None or settings is None:
            return {}
        if self._step % settings.every_steps and self._step != self._config.total_steps:
            return {}
        self._await_push()
        with self._timed("evaluation"):
            collected = self._services.collect(self._held_out.batch(0), oldest_step=self._step)
            batch = self.wait_for(collected, "evaluating")
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

    def _rollout_metrics(self, batch: RolloutBatch) -> dict[str, float]:
        push = self._last_push
        return {
            "episode": float(self._num_samples),
            "rollout/dropped": float(len(batch.drops)),
            "rollout/dropped_total": float(self._num_dropped),
            "rollout/resent": float(batch.num_resent),
            "rollout/stale_redrawn": float(batch.num_stale),
            "rollout/seconds": batch.seconds,
            "push/bytes": float(push.pushed_bytes),
            "push/delta_share": push.delta_share,
            "push/pause_seconds": push.pause_seconds,
            "push/activation_skew_seconds": push.activation_skew_seconds,
            "push/replicas_behind": float(len(push.failures)),
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
        state: dict[str, Any] = {
            "learner": self._learner.state_dict(),
            "random": random_state(),
            "kl": self._kl.state_dict(),
            "num_samples": self._num_samples,
            "num_dropped": self._num_dropped,
        }
        with self._timed("checkpoint"), self._run.world.long("writing a checkpoint"):
            self._run.sync()
            self._store.save(self._step, state=state, write_files=self._learner.write)
        self._saved_step = self._step

    def _resume(self) -> None:
        checkpoint = self._store.latest()
        if checkpoint is None:
            self._run.rewind(0)
            return
        state = checkpoint.state()
        self._learner.read(checkpoint.directory, state["learner"])
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


__all__ = ["PpoLoop", "PpoResult", "Stopped", "load_learner", "load_models", "run_ppo"]
