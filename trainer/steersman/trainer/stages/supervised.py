"""The loop that supervised stages share: batches in, updates out; checkpoints, evaluation, resume and cancellation.

Invariants:

- Update ``n`` depends on the weights, the seed and ``n`` alone; a resumed run makes the same updates as one that never
  stopped.
- A checkpoint of step ``n`` holds what is after ``n`` updates, and ``metrics.jsonl`` then has no row beyond ``n``.
- The final model appears at ``<run>/model`` whole, or not at all.
- On several ranks each runs this loop with the same data in the same order, and computes its share of every batch;
  they decide together when to stop. Only the lead writes, but for its shards every rank writes its own.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steersman.trainer.algorithm.metrics import MetricSums
from steersman.trainer.checkpoint.atomic import CheckpointError, verify
from steersman.trainer.checkpoint.models import (
    load_tokenizer,
    require_savable,
    save_model,
)
from steersman.trainer.checkpoint.state import random_state, restore_random_state
from steersman.trainer.checkpoint.store import Checkpoint, CheckpointStore
from steersman.trainer.data.encode import Encoder
from steersman.trainer.data.order import EpochOrder
from steersman.trainer.distributed.totals import total
from steersman.trainer.distributed.world import World
from steersman.trainer.stages.optim import apply_update, build_optimizer
from steersman.trainer.stages.run import METRICS_FILE, Run
from steersman.trainer.stages.supervised_config import SupervisedConfig
from steersman.trainer.stages.trained import Trained

_log = logging.getLogger(__name__)


def read_tokenizer(config: SupervisedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer asked for. CheckpointError if there is none."""
    path = config.tokenizer or config.model.path
    assert path is not None
    return load_tokenizer(path, revision=None if config.tokenizer else config.model.revision)


def make_encoder(config: SupervisedConfig, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The encoder with the configuration's bounds and template."""
    return Encoder(
        tokenizer=tokenizer,
        max_prompt_tokens=config.max_prompt_tokens,
        max_response_tokens=config.max_response_tokens,
        transcript=config.transcript,
    )


class SupervisedTask(Protocol):
    """What one stage adds to the loop. On several ranks each has one, and all are called at the same time."""

    @property
    def num_records(self) -> int:
        """Records to train on."""
        ...

    def accumulate(self, records: list[int]) -> MetricSums:
        """Adds the gradient of one batch, of these record numbers, to the parameters; on several ranks each computes
        its share.

        Its sums hold ``loss`` and ``num_tokens``, the tokens that went through the model of this rank.
        """
        ...

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out data, under ``eval/``, the same on every rank; empty without any."""
        ...

    def finish(self) -> dict[str, float]:
        """Called after the last update, before the model is saved; further metrics for the result."""
        ...

    def files(self) -> Mapping[str, Any]:
        """JSON files to lie beside the model, by name; asked for after `finish`."""
        ...


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """How a stage ended. ``model_directory`` is None if it was stopped first; its checkpoint then lets it go on."""

    num_steps: int
    total_steps: int
    stopped: bool
    model_directory: Path | None
    metrics: dict[str, float] = field(default_factory=dict)


def train(
    config: SupervisedConfig,
    task: SupervisedTask,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    *,
    facts: Mapping[str, float],
) -> StageResult:
    """Trains ``model`` (already on its device or sharded) to the end, or until the run is asked to stop.

    ``facts`` are numbers about the data that go into the last row. A run that had already ended is left as it is.
    """
    require_room(config, model)
    require_savable(model, tokenizer)
    total_steps = config.total_steps(task.num_records)
    order = EpochOrder(task.num_records, batch_size=config.batch_size, seed=config.seed)
    optimizer = build_optimizer(config.optimizer, model)
    world = run.world
    trained = Trained(world=world, models={"": model}, optimizers={"": optimizer})
    identity = {"num_records": task.num_records, "batch_size": config.batch_size, "seed": config.seed}
    ended = _ended(run.directory / "model", total_steps, identity)
    if world.any(ended is not None):
        return ended or StageResult(num_steps=total_steps, total_steps=total_steps, stopped=False, model_directory=None)
    checkpoints = _Checkpoints(config, trained, identity, tokenizer, run)
    start = checkpoints.resume()

    window = _Window(MetricSums(), time.monotonic())
    last_row: dict[str, float] = {}
    for step in range(start, total_steps):
        if world.any(run.stop_requested()):
            checkpoints.save(step)
            run.progress(step, total_steps, "stopped")
            return StageResult(num_steps=step, total_steps=total_steps, stopped=True, model_directory=None)
        window.sums.merge(task.accumulate(order.batch(step)))
        update = apply_update(optimizer, config.optimizer, step=step, total_steps=total_steps, world=world)
        done = step + 1
        row: dict[str, float] = {}
        if done % config.log_every_steps == 0 or done == total_steps:
            row |= window.close(world) | update | {"epoch": done / order.steps_per_epoch}
            window = _Window(MetricSums(), time.monotonic())
        if done == total_steps:
            last_row = row  # waits for the final evaluation: a step has one row
            break
        if config.eval_every_steps and done % config.eval_every_steps == 0:
            row |= task.evaluate()
        if row:
            run.log(done, row)
        run.progress(done, total_steps, _progress(row))
        if config.save_every_steps and done % config.save_every_steps == 0:
            checkpoints.save(done)

    run.progress(total_steps, total_steps, "evaluating")
    final = task.evaluate() | task.finish() | dict(facts)
    run.log(total_steps, last_row | final)
    directory = run.directory / "model"
    metadata = identity | {"step": total_steps, "metrics": _finite(final)}
    whole = trained.whole("")
    if whole is not None:
        with world.long("writing the model"):
            save_model(directory, whole, tokenizer, metadata=metadata, files=task.files())
    world.barrier()  # the others watch over the lead until it is done
    run.progress(total_steps, total_steps, "done")
    return StageResult(
        num_steps=total_steps,
        total_steps=total_steps,
        stopped=False,
        model_directory=directory,
        metrics=last_row | final,
    )


@dataclass
class _Window:
    """Metrics of the updates since the last row."""

    sums: MetricSums
    since: float

    def close(self, world: World) -> dict[str, float]:
        """A collective."""
        seconds = time.monotonic() - self.since
        sums = total(world, self.sums)
        means = sums.means()
        means.pop("num_tokens")
        num_tokens = float(sums.totals["num_tokens"])
        return means | {"time/tokens_per_s": num_tokens / max(seconds, 1e-9), "time/s": seconds}


class _Checkpoints:
    """The checkpoints of a run. All calls are collectives."""

    def __init__(
        self,
        config: SupervisedConfig,
        trained: Trained,
        identity: dict[str, int],
        tokenizer: PreTrainedTokenizerBase,
        run: Run,
    ) -> None:
        self._trained = trained
        self._identity = identity
        self._tokenizer = tokenizer
        self._run = run
        self._root = run.directory / "checkpoints"
        self._store = CheckpointStore(self._root, keep=config.keep_checkpoints) if run.world.is_lead else None

    def save(self, step: int) -> None:
        """Writes the checkpoint of `step`."""
        if self._store is None:
            self._trained.write(Path(self._run.world.from_lead(None).decode()))
            return
        state = {"optimizer": self._trained.state_dict()[""], "random": random_state(), "identity": self._identity}
        self._run.sync()
        with self._run.world.long("writing a checkpoint"):
            self._store.save(step, state=state, write_files=self._write)

    def resume(self) -> int:
        """Goes on from the last checkpoint; gives its step, 0 if there is none."""
        found = self._store.latest() if self._store is not None else None
        directory = self._run.world.from_lead(str(found.directory).encode() if found is not None else b"").decode()
        if not directory:
            if (self._run.directory / METRICS_FILE).exists():
                self._run.rewind(0)
            return 0
        checkpoint = Checkpoint.at(Path(directory))
        state = checkpoint.state()
        if state.get("identity") != self._identity:
            raise CheckpointError(
                f"{checkpoint.directory} was made with {state.get('identity')}, but the run now has {self._identity}: "
                "the order of the data would differ; use another run folder"
            )
        self._trained.read(checkpoint.directory, {"": state["optimizer"]})
        restore_random_state(state["random"])
        self._run.rewind(checkpoint.step)
        _log.info("going on from step %d", checkpoint.step)
        return checkpoint.step

    def _write(self, directory: Path) -> None:
        self._run.world.from_lead(str(directory).encode())
        self._trained.write(directory)
        self._tokenizer.save_pretrained(directory)


def _ended(directory: Path, total_steps: int, identity: dict[str, int]) -> StageResult | None:
    """The result of this very run, if it ended before: whoever started it may have died before hearing of it."""
    try:
        made = verify(directory)["metadata"]
    except CheckpointError:
        return None
    if {name: made.get(name) for name in (*identity, "step")} != identity | {"step": total_steps}:
        return None
    return StageResult(
        num_steps=total_steps,
        total_steps=total_steps,
        stopped=False,
        model_directory=directory,
        metrics=made["metrics"],
    )


def require_room(config: SupervisedConfig, model: PreTrainedModel) -> None:
    """ValueError if the longest sequence that the configuration allows does not fit into the model's context."""
    context = getattr(model.config, "max_position_embeddings", None)
    longest = config.max_prompt_tokens + config.max_response_tokens
    if context is not None and longest > context:
        raise ValueError(
            f"max_prompt_tokens + max_response_tokens is {longest}, must be at most the model's context of {context}"
        )


def _progress(metrics: dict[str, float]) -> str:
    return f"loss {metrics['loss']:.4f}" if "loss" in metrics else "training"


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if abs(value) < float("inf")}
