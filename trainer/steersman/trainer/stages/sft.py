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
from steersman.trainer.checkpoint.models import hidden_states, lm_head, open_actor
from steersman.trainer.data.batches import PaddedBatch, pad, passes, worthwhile_padding
from steersman.trainer.data.encode import Example
from steersman.trainer.data.load import load_demonstrations
from steersman.trainer.distributed.totals import total
from steersman.trainer.distributed.world import Scope, World
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
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    task = _SftTask(
        model=model,
        world=run.world,
        scope=placement.settle(model, run.world, opened.files),
        placement=placement,
        examples=encoder.demonstrations([records[n] for n in train_numbers]),
        eval_examples=encoder.demonstrations(eval_records),
        pad_id=int(pad_id),
        micro_batch_tokens=config.micro_batch_tokens,
        train_on_prompt=config.train_on_prompt,
    )
    return train(config, task, model, tokenizer, run, facts=report.metrics())


@dataclass(frozen=True, kw_only=True)
class _SftTask:
    model: PreTrainedModel
    world: World
    scope: Scope[Any]
    placement: Placement
    examples: list[Example]
    eval_examples: list[Example]
    pad_id: int
    micro_batch_tokens: int
    train_on_prompt: bool

    @property
    def num_records(self) -> int:
        return len(self.examples)

    def accumulate(self, records: list[int]) -> MetricSums:
        examples = [self.examples[n] for n in records]
        denominator = max(1, sum(self._num_counted(example) for example in examples))
        sums = MetricSums()
        for batch, share in self._batches(examples):
            logprobs_N = self.scope(partial(self._logprobs, batch))
            output = token_nll_loss(logprobs_N, torch.ones_like(logprobs_N, dtype=torch.bool), denominator=denominator)
            (output.loss * share).backward()  # type: ignore[no-untyped-call]
            sums.add({"loss": output.sums["nll"] * share}, count=output.count * share)
            sums.add({"num_tokens": batch.lengths_B.sum() * share}, count=share)
        return sums

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        if not self.eval_examples:
            return {}
        sums = MetricSums()
        for batch, share in self._batches(self.eval_examples):
            logprobs_N, correct_N = self.scope(partial(self._judged, batch))
            correct, count = correct_N.sum() * share, len(correct_N) * share
            sums.add({"eval/loss": -logprobs_N.sum() * share, "eval/accuracy": correct}, count=count)
        return total(self.world, sums).means()

    def finish(self) -> dict[str, float]:
        return {}

    def files(self) -> dict[str, Any]:
        return {}

    def _batches(self, examples: list[Example]) -> Iterator[tuple[PaddedBatch, float]]:
        """This rank's micro-batches, and 1; or 0 where one does not count."""
        for one in passes(
            [example.num_tokens for example in examples],
            token_budget=self.micro_batch_tokens,
            max_padding=worthwhile_padding(self.placement.device),
            rank=self.world.rank,
            num_ranks=self.world.size,
        ):
            chosen = [examples[n] for n in one.items]
            batch = pad([e.prompt_ids for e in chosen], [e.response_ids for e in chosen], pad_id=self.pad_id)
            yield batch.to(self.placement.device), float(one.counts)

    def _logprobs(self, batch: PaddedBatch) -> Tensor:
        hidden_ND, targets_N = self._counted(batch)
        return logprobs_from_hidden(hidden_ND, lm_head(self.model).weight, targets_N).logprobs

    def _judged(self, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
        """Log-probs ``[N]`` of the counted tokens, and whether they are the most likely ones."""
        hidden_ND, targets_N = self._counted(batch)
        head = lm_head(self.model).weight
        logprobs_N = logprobs_from_hidden(hidden_ND, head, targets_N).logprobs
        return logprobs_N, most_likely_tokens(hidden_ND, head) == targets_N

    def _counted(self, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
        """Hidden states ``[N, D]`` that predict the counted tokens, and these ``[N]``: the head sees no others."""
        mask_BT = batch.response_mask_BT
        if self.train_on_prompt:
            mask_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device) < batch.lengths_B[:, None]
        mask_BT = mask_BT[:, 1:]
        with self.placement.autocast():
            states_BTD = hidden_states(self.model, batch.ids_BT[:, :-1])
        return states_BTD[mask_BT], batch.ids_BT[:, 1:][mask_BT]

    def _num_counted(self, example: Example) -> int:
        return example.num_tokens - 1 if self.train_on_prompt else len(example.response_ids)
