"""The reward model: a scalar head trained on human comparisons by the Bradley-Terry likelihood."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steersman.trainer.algorithm.losses import LossOutput, RankedPairs, bradley_terry_loss, ranked_pairs
from steersman.trainer.algorithm.metrics import MetricSums
from steersman.trainer.checkpoint.atomic import write_json
from steersman.trainer.checkpoint.models import adopt_special_tokens, open_scalar_head, score_head
from steersman.trainer.data.batches import Pass, passes, worthwhile_padding
from steersman.trainer.data.encode import Encoder, Example
from steersman.trainer.data.load import load_comparisons
from steersman.trainer.data.order import balanced
from steersman.trainer.data.records import Comparison
from steersman.trainer.distributed.world import Scope, World
from steersman.trainer.stages import reward_normalization
from steersman.trainer.stages.packed import TokenBatch, batch_of, packing_step, states_at
from steersman.trainer.stages.placement import Placement, place
from steersman.trainer.stages.reward_evaluation import JudgedPair, evaluate_pairs
from steersman.trainer.stages.reward_model_config import RewardModelConfig
from steersman.trainer.stages.run import Run
from steersman.trainer.stages.supervised import StageResult, make_encoder, read_tokenizer, train

_log = logging.getLogger(__name__)
_PAD_TOKEN = "<|pad|>"
# Enough to find a wrong tokenizer, head or data type; a few kilobytes.
_CHECKED_COMPARISONS = 16
# All pairs of responses of so many comparisons are looked at together.
_COMPARISONS_AT_ONCE = 64
EVALUATION_FILE: Final = "evaluation.json"
SCORES_FILE: Final = "scores.json"


def run_reward_model(config: RewardModelConfig, run: Run) -> StageResult:
    """Trains a scalar head on comparisons; the model goes to ``<run>/model``.

    More than two ranked responses become all their pairs, each comparison counting once. Scores are those of the last
    token, EOS for a response that was not cut off; the padding token is never EOS, so that the Hugging Face forward
    pass (and the reward service) finds the same last token.

    Logs ``loss``, ``accuracy``, ``reward_gap``; on held-out data the same under ``eval/``, with intervals, by subset
    and by length, and the calibration error; ``<run>/evaluation.json`` has it all as a table. ``<run>/scores.json`` has
    a few responses with the scores that training ended with, for ``steersman rewards check``. The saved configuration
    holds ``reward_mean`` and ``reward_std`` of the responses trained on (InstructGPT shifts the reward so that its mean
    is zero; a consumer may do so with these), and ``reward_encoding``, how text is to become tokens.

    DataError, CheckpointError or ValueError name what is wrong with the data, the model or a setting.
    """
    run.world.watch(config.rank_patience_seconds)
    tokenizer = read_tokenizer(config)
    records, report = load_comparisons(config.data)
    train_numbers, eval_numbers = config.held_out(len(records))
    eval_records = [records[n] for n in eval_numbers]
    if config.eval_data is not None:
        eval_records, _ = load_comparisons(config.eval_data)
    run.progress(0, config.max_steps or 0, f"{report.num_records} comparisons, {report.num_bad_rows} bad rows left out")

    placement = place(run.world.device(config.device), config.dtype)
    _require_padding(tokenizer)
    opened = open_scalar_head(config.model, seed=config.seed, tokenizer=tokenizer, in_parts=run.world.size > 1)
    model = opened.model
    _cover_vocabulary(model, tokenizer)
    scope = placement.settle(model, run.world, opened.files)
    encoder = make_encoder(config, tokenizer)
    comparisons = _encode(encoder, [records[n] for n in train_numbers], use_ties=config.use_ties)
    if not comparisons:
        raise ValueError("no comparison ranks one response above another: nothing to learn from")
    task = _RewardModelTask(
        config=config,
        model=model,
        world=run.world,
        scope=scope,
        placement=placement,
        comparisons=comparisons,
        order=balanced([c.longer_preferred for c in comparisons], seed=config.seed)
        if config.balance_lengths
        else list(range(len(comparisons))),
        eval_comparisons=_encode(encoder, eval_records, use_ties=False),
        directory=run.directory,
    )
    return train(config, task, model, tokenizer, run, facts=report.metrics())


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """A comparison as tokens."""

    examples: list[Example]
    ranks: tuple[int, ...]
    margin: float
    subset: str
    annotator: str

    @property
    def longer_preferred(self) -> int:
        """1 if more pairs prefer the longer response than the shorter one, -1 if fewer do, else 0."""
        pairs = [
            (len(better.response_ids) > len(worse.response_ids)) - (len(better.response_ids) < len(worse.response_ids))
            for better, rank in zip(self.examples, self.ranks, strict=True)
            for worse, other in zip(self.examples, self.ranks, strict=True)
            if rank < other
        ]
        return (sum(pairs) > 0) - (sum(pairs) < 0)


@dataclass(frozen=True, kw_only=True)
class _RewardModelTask:
    config: RewardModelConfig
    model: PreTrainedModel
    world: World
    scope: Scope[Any]
    placement: Placement
    comparisons: list[_Encoded]
    order: list[int]
    eval_comparisons: list[_Encoded]
    directory: Path
    normalization: dict[str, Any] = field(default_factory=dict)

    @property
    def num_records(self) -> int:
        return len(self.order)

    def accumulate(self, records: list[int]) -> MetricSums:
        comparisons = [self.comparisons[self.order[n]] for n in records]
        sums = MetricSums()
        for one in self._passes(comparisons):
            batch, group = self._batch([comparisons[n] for n in one.items])
            share, scores_B = float(one.counts), self._scores(batch)
            output, pairs = self._loss(scores_B, group, denominator=len(comparisons), smoothed=True)
            loss = output.loss
            if self.config.score_penalty:
                loss = loss + self.config.score_penalty * (scores_B.square() * self._shares(group)).sum() / len(
                    comparisons
                )
            (loss * share).backward()  # type: ignore[no-untyped-call]
            _add(sums, output, pairs, share=share)
            num_tokens = torch.tensor(sum(batch.lengths) * share, device=scores_B.device)
            sums.add({"num_tokens": num_tokens}, count=share)
        return sums

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        if not self.eval_comparisons:
            return {}
        sums = MetricSums()
        judged: list[JudgedPair] = []
        for scores_B, group in self._all_scored(self.eval_comparisons):
            output, pairs = self._loss(scores_B, group, denominator=1, smoothed=False)
            _add(sums, output, pairs)
            judged += _judged(scores_B, pairs, group)
        evaluation = evaluate_pairs(judged)
        if self.world.is_lead:
            write_json(self.directory / EVALUATION_FILE, evaluation.table())
        return {f"eval/{name}": value for name, value in sums.means().items()} | evaluation.metrics()

    @torch.no_grad()
    def finish(self) -> dict[str, float]:
        # Tells whoever serves the model that text is to become tokens the way it did here.
        self.model.config.reward_encoding = "continuation"
        self._write_scores()
        fitted = self._fit_normalization()
        if fitted is None:
            return {}
        self.normalization.update(fitted)
        return {"reward_mean": fitted["mean"], "reward_std": fitted["std"]}

    def files(self) -> dict[str, Any]:
        return {reward_normalization.FILE_NAME: self.normalization} if self.normalization else {}

    def _fit_normalization(self) -> dict[str, Any] | None:
        if self.config.normalize_on == "none":
            return None
        some = [self.comparisons[n] for n in reward_normalization.evenly(len(self.comparisons))]
        chosen_only = self.config.normalize_on == "chosen"
        scores = []
        for scores_B, group in self._all_scored(some):
            counts = [not chosen_only or rank == min(c.ranks) for c in group for rank in c.ranks]
            scores.append(scores_B[torch.tensor(counts, device=self.placement.device)])
        reference = "best" if chosen_only else "all"
        return reward_normalization.fit(torch.cat(scores), f"{reference} responses of {len(some)} training comparisons")

    def _write_scores(self) -> None:
        """The scores of some responses, for whoever serves the model to compare with."""
        some = (self.eval_comparisons or self.comparisons)[:_CHECKED_COMPARISONS]
        items = []
        for scores_B, group in self._all_scored(some):
            examples = [example for comparison in group for example in comparison.examples]
            for example, score in zip(examples, scores_B.tolist(), strict=True):
                items.append({"prompt": example.prompt_ids, "response": example.response_ids, "raw_score": score})
        dtype = str(self.placement.dtype).removeprefix("torch.")
        if self.world.is_lead:
            write_json(self.directory / SCORES_FILE, {"dtype": dtype, "items": items})

    def _scores(self, batch: TokenBatch) -> Tensor:
        """The score at the last token of each row, as the Hugging Face forward pass gives it: ``[B]``."""
        lasts = [start + length - 1 for start, length in zip(batch.starts_B, batch.lengths, strict=True)]
        lasts_B = torch.tensor(lasts, device=self.placement.device)

        def score() -> Tensor:
            states_PD = states_at(self.model, batch, batch.rounded(lasts_B))
            return cast(Tensor, score_head(self.model)(states_PD)).squeeze(-1).float()[: len(lasts)]

        with self.placement.autocast():
            scores_B: Tensor = self.scope(score)
        return scores_B

    def _all_scored(self, comparisons: list[_Encoded]) -> Iterator[tuple[Tensor, list[_Encoded]]]:
        """Scores of all responses, some comparisons at a time, in their order; each rank computes its share."""
        starts = list(accumulate((len(c.examples) for c in comparisons), initial=0))
        scores_R = torch.zeros(starts[-1], device=self.placement.device)
        for one in self._passes(comparisons):
            batch, group = self._batch([comparisons[n] for n in one.items])
            scores_B = self._scores(batch)
            if one.counts:
                rows = [row for n in one.items for row in range(starts[n], starts[n + 1])]
                scores_R[torch.tensor(rows, device=scores_R.device)] = scores_B
        self.world.sum(scores_R)
        for first in range(0, len(comparisons), _COMPARISONS_AT_ONCE):
            group = comparisons[first : first + _COMPARISONS_AT_ONCE]
            yield scores_R[starts[first] : starts[first + len(group)]], group

    def _loss(
        self, scores_B: Tensor, group: list[_Encoded], *, denominator: int, smoothed: bool
    ) -> tuple[LossOutput, RankedPairs]:
        device = scores_B.device
        comparison_B = torch.tensor([n for n, c in enumerate(group) for _ in c.ranks], device=device)
        ranks_B = torch.tensor([rank for c in group for rank in c.ranks], device=device)
        pairs = ranked_pairs(ranks_B, comparison_B, include_ties=smoothed and self.config.use_ties)
        margin_P = None
        if smoothed and self.config.use_margins and any(c.margin for c in group):
            margin_P = torch.tensor([c.margin for c in group], device=device)[comparison_B[pairs.better_P]]
        output = bradley_terry_loss(
            scores_B[pairs.better_P],
            scores_B[pairs.worse_P],
            denominator=denominator,
            weight_P=pairs.weight_P,
            margin_P=margin_P,
            tie_P=pairs.tie_P,
            label_smoothing=self.config.label_smoothing if smoothed else 0.0,
        )
        return output, pairs

    def _shares(self, group: list[_Encoded]) -> Tensor:
        return torch.tensor([1 / len(c.ranks) for c in group for _ in c.ranks], device=self.placement.device)

    def _passes(self, comparisons: list[_Encoded]) -> list[Pass]:
        """This rank's micro-batches of whole comparisons: the responses of one are always scored together."""
        packed = packing_step(self.model) is not None
        size = sum if packed else max
        return passes(
            [size(example.num_tokens for example in c.examples) for c in comparisons],
            token_budget=self.config.micro_batch_tokens,
            rows=[len(c.examples) for c in comparisons],
            max_padding=worthwhile_padding(self.placement.device),
            packed=packed,
            rank=self.world.rank,
            num_ranks=self.world.size,
        )

    def _batch(self, group: list[_Encoded]) -> tuple[TokenBatch, list[_Encoded]]:
        rows = [[*example.prompt_ids, *example.response_ids] for c in group for example in c.examples]
        return batch_of(rows, self.placement.device, step=packing_step(self.model)), group


def _add(sums: MetricSums, output: LossOutput, pairs: RankedPairs, *, share: float = 1.0) -> None:
    sums.add({"loss": output.sums["loss"] * share}, count=output.count * share)
    decided = (pairs.weight_P * ~pairs.tie_P).sum() * share
    sums.add({name: output.sums[name] * share for name in ("accuracy", "reward_gap")}, count=decided)


def _judged(scores_B: Tensor, pairs: RankedPairs, group: list[_Encoded]) -> list[JudgedPair]:
    rows = [(comparison, example) for comparison in group for example in comparison.examples]
    judged = []
    gaps = (scores_B[pairs.better_P] - scores_B[pairs.worse_P]).tolist()
    for gap, better, worse in zip(gaps, pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True):
        comparison, preferred = rows[better]
        other = rows[worse][1]
        texts = sorted([preferred.response_ids, other.response_ids])
        judged.append(
            JudgedPair(
                gap=gap,
                longer_by_tokens=len(preferred.response_ids) - len(other.response_ids),
                subset=comparison.subset,
                annotator=comparison.annotator,
                key=repr((preferred.prompt_ids, texts)),
                preferred_first=texts[0] == preferred.response_ids,
            )
        )
    return judged


def _encode(encoder: Encoder, records: list[Comparison], *, use_ties: bool) -> list[_Encoded]:
    """Comparisons as tokens, without those that would make no pair."""
    useful = [record for record in records if use_ties or len(set(record.ranks)) > 1]
    if len(useful) < len(records):
        _log.info("left out %d comparisons in which all responses are tied", len(records) - len(useful))
    return [
        _Encoded(
            examples=examples,
            ranks=record.ranks,
            margin=record.margin or 0.0,
            subset=record.subset,
            annotator=record.annotator,
        )
        for record, examples in zip(useful, encoder.comparisons(useful), strict=True)
    ]


def _require_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Sees to a padding token that is no other token; a new one is added where EOS served as padding.

    Scorers take the last token that is not padding: with EOS as padding they would score the token before it.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": _PAD_TOKEN})


def _cover_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    rows = embedding.num_embeddings
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        # The new rows stand for padding alone, which no score depends on: zero is the same each time.
        with torch.no_grad():
            cast(nn.Embedding, model.get_input_embeddings()).weight[rows:] = 0.0
    adopt_special_tokens(model, tokenizer)
