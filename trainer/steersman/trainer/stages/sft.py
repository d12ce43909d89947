"""Supervised fine-tuning: the likelihood of demonstrated responses."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steersman.trainer.algorithm.logprobs import logprobs_from_hidden, most_likely_tokens
from steersman.trainer.algorithm.losses import token_nll_loss
from steersman.trainer.algorithm.metrics import MetricSums
from steersman.trainer.checkpoint.models import lm_head, open_actor
from steersman.trainer.data.batches import passes, worthwhile_padding
from steersman.trainer.data.encode import Example
from steersman.trainer.data.load import load_demonstrations
from steersman.trainer.distributed.totals import total
from steersman.trainer.distributed.world import Scope, World
from steersman.trainer.stages.packed import TokenBatch, batch_of, packing_step, states_at
from steersman.trainer.stages.placement import Placement, place
from steersman.trainer.stages.run import Run
from steersman.trainer.stages.sft_config import SftConfig
from steersman.trainer.stages.supervised import StageResult, make_encoder, read_tokenizer, train


def run_sft(config: SftConfig, run: Run) -> StageResult:
    """Fine-tunes a causal language model on demonstrations; the model goes to ``<run>/model``.

    Logs ``loss`` (nats per counted token), ``lr``, ``grad_norm``, ``time/tokens_per_s``; on held-out data ``eval/loss``
    and ``eval/accuracy`` (share of counted tokens that are the most likely one). Goes on from the run's last
    checkpoint. DataError, CheckpointError or ValueError name what is wrong with the data, the model or a setting.
    """
    run.world.watch(config.rank_patience_seconds)
    tokenizer = read_tokenizer(config)
    encoder = make_encoder(config, tokenizer)
    records, report = load_demonstrations(config.data)
    train_numbers, eval_numbers = config.held_out(len(records))
    eval_records = [records[n] for n in eval_numbers]
    if config.eval_data is not None:
        eval_records, _ = load_demonstrations(config.eval_data)
    run.progress(
        0, config.max_steps or 0, f"{report.num_records} demonstrations, {report.num_bad_rows} bad rows left out"
    )

    placement = place(run.world.device(config.device), config.dtype)
    opened = open_actor(config.model, seed=config.seed, tokenizer=tokenizer, in_parts=run.world.size > 1)
    model = opened.model
    task = _SftTask(
        model=model,
        world=run.world,
        scope=placement.settle(model, run.world, opened.files),
        placement=placement,
        examples=encoder.demonstrations([records[n] for n in train_numbers]),
        eval_examples=encoder.demonstrations(eval_records),
        micro_batch_tokens=config.micro_batch_tokens,
        train_on_prompt=config.train_on_prompt,
    )
    return train(config, task, model, tokenizer, run, facts=report.metrics())


@dataclass(frozen=True, kw_only=True)
class _Micro:
    """Some examples without their last tokens, which predict nothing. `predicting_N` are flat places in `batch` whose
    states predict the counted tokens `targets_N`; `num_tokens` are all that were read.
    """

    batch: TokenBatch
    predicting_N: Tensor  # noqa: N815
    targets_N: Tensor  # noqa: N815
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class _SftTask:
    model: PreTrainedModel
    world: World
    scope: Scope[Any]
    placement: Placement
    examples: list[Example]
    eval_examples: list[Example]
    micro_batch_tokens: int
    train_on_prompt: bool

    @property
    def num_records(self) -> int:
        return len(self.examples)

    def accumulate(self, records: list[int]) -> MetricSums:
        examples = [self.examples[n] for n in records]
        denominator = max(1, sum(self._num_counted(example) for example in examples))
        sums = MetricSums()
        for micro, share in self._micros(examples):
            logprobs_N = self.scope(partial(self._logprobs, micro))
            output = token_nll_loss(logprobs_N, torch.ones_like(logprobs_N, dtype=torch.bool), denominator=denominator)
            (output.loss * share).backward()  # type: ignore[no-untyped-call]
            sums.add({"loss": output.sums["nll"] * share}, count=output.count * share)
            num_tokens = torch.tensor(micro.num_tokens * share, device=logprobs_N.device)
            sums.add({"num_tokens": num_tokens}, count=share)
        return sums

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        if not self.eval_examples:
            return {}
        sums = MetricSums()
        for micro, share in self._micros(self.eval_examples):
            logprobs_N, correct_N = self.scope(partial(self._judged, micro))
            correct, count = correct_N.sum() * share, len(correct_N) * share
            sums.add({"eval/loss": -logprobs_N.sum() * share, "eval/accuracy": correct}, count=count)
        return total(self.world, sums).means()

    def finish(self) -> dict[str, float]:
        return {}

    def files(self) -> dict[str, Any]:
        return {}

    def _micros(self, examples: list[Example]) -> Iterator[tuple[_Micro, float]]:
        """This rank's micro-batches, and 1; or 0 where one does not count."""
        for one in passes(
            [example.num_tokens - 1 for example in examples],
            token_budget=self.micro_batch_tokens,
            max_padding=worthwhile_padding(self.placement.device),
            packed=packing_step(self.model) is not None,
            rank=self.world.rank,
            num_ranks=self.world.size,
        ):
            yield self._micro([examples[n] for n in one.items]), float(one.counts)

    def _micro(self, examples: list[Example]) -> _Micro:
        device = self.placement.device
        rows = [[*example.prompt_ids, *example.response_ids] for example in examples]
        batch = batch_of([row[:-1] for row in rows], device, step=packing_step(self.model))
        counts = [self._num_counted(example) for example in examples]
        ends = [start + len(row) - 1 for start, row in zip(batch.starts_B, rows, strict=True)]
        predicting = [place for end, count in zip(ends, counts, strict=True) for place in range(end - count, end)]
        targets = [token for row, count in zip(rows, counts, strict=True) for token in row[len(row) - count :]]
        return _Micro(
            batch=batch,
            predicting_N=torch.tensor(predicting, device=device),
            targets_N=torch.tensor(targets, device=device),
            num_tokens=sum(len(row) for row in rows),
        )

    def _logprobs(self, micro: _Micro) -> Tensor:
        return logprobs_from_hidden(self._states(micro), lm_head(self.model).weight, micro.targets_N).logprobs

    def _judged(self, micro: _Micro) -> tuple[Tensor, Tensor]:
        """Log-probs ``[N]`` of the counted tokens, and whether they are the most likely ones."""
        hidden_ND, head = self._states(micro), lm_head(self.model).weight
        logprobs_N = logprobs_from_hidden(hidden_ND, head, micro.targets_N).logprobs
        return logprobs_N, most_likely_tokens(hidden_ND, head) == micro.targets_N

    def _states(self, micro: _Micro) -> Tensor:
        """Hidden states ``[N, D]`` that predict the counted tokens: the head sees no others."""
        with self.placement.autocast():
            states_PD = states_at(self.model, micro.batch, micro.batch.rounded(micro.predicting_N))
        return states_PD[: len(micro.predicting_N)]

    def _num_counted(self, example: Example) -> int:
        return example.num_tokens - 1 if self.train_on_prompt else len(example.response_ids)
