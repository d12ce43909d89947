"""Scores of a Hugging Face sequence classifier with one label, in PyTorch.

A decoder's score is read at the last token of the row. Only that hidden state goes through the head, in float32: a
bfloat16 head would round scores to two or three digits.

The last token is the last one that was given. Transformers' own forward pass takes the last one that is not the padding
id, which is another token when responses end with EOS and EOS is also the padding id.

Three ways to compute, the first that gives what the model's own forward pass gives: rows packed one behind the other,
common beginnings once (plain causal attention; on a CPU by a forward pass of our own, where the architecture is known);
rows padded on the right (other causal models); the model's own pass.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForSequenceClassification

from steersman.reward.engine.port import Normalization
from steersman.reward.settings import ModelScorerSettings
from steersman.serving.models import (
    Checkpoint,
    choose_device,
    eos_token_ids,
    find_checkpoint,
    load_pretrained,
    pad_rows,
    pad_token_id,
    sequence_limit,
)
from steersman.serving.packed_attention import NotPackableError, packed, run_pack
from steersman.serving.packed_decoder import PackedDecoder
from steersman.serving.packing import pack_rows
from steersman.serving.prefixes import MIN_SHARED_TOKENS
from steersman.serving.threads import ThreadShares, default_calls
from steersman.wire.identity import ModelInfo

logger = logging.getLogger(__name__)

# Difference to the model's own forward pass, relative to the size of its scores, that rounding explains.
_TOLERANCE: Final = 1e-3
_TOLERANCE_HALF: Final = 0.05


class TorchScoreEngine:
    """A sequence classifier with one label, in evaluation mode, on one device."""

    def __init__(
        self,
        model: Any,
        info: ModelInfo,
        *,
        normalization: Normalization | None = None,
        share_prefixes: bool = True,
        num_workers: int | None = None,
    ) -> None:
        """`model` is a `PreTrainedModel` for sequence classification; its attention is exchanged if packs are right.

        `num_workers` calls of `score` may run side by side and share the threads that torch uses now. Default: one for
        each thread, at most 4, on a CPU; 1 on an accelerator.
        """
        self.model = info
        self.normalization = normalization or Normalization()
        # How the model was trained to see text, if it says so: see `steersman.reward.text`.
        self.encoding: str | None = getattr(model.config, "reward_encoding", None)
        self._classifier = model.eval()
        self.device = next(model.parameters()).device
        self.device_type: str = self.device.type
        self.parameter_bytes: int = sum(parameter.nbytes for parameter in model.parameters())
        num_threads = torch.get_num_threads()
        self.num_workers = num_workers or default_calls(self.device_type, num_threads)
        self._threads = ThreadShares(num_threads, self.num_workers if self.device_type == "cpu" else 1)
        self._pad_id = pad_token_id(model.config)
        head = getattr(model, "score", None)
        self._head_weight = head.weight.detach().float() if isinstance(head, torch.nn.Linear) else None
        self._head_bias = head.bias.detach().float() if head is not None and head.bias is not None else None
        self._transformer = model.base_model
        self._expected = self._probe()
        self._reads_last_token = self._head_weight is not None and self._agrees_with_model(self._score_last_token)
        self._decoder: PackedDecoder | None = None
        self.shares_prefixes = share_prefixes and self._reads_last_token and self._can_pack()
        if self.shares_prefixes and self.device_type == "cpu":
            self._use_decoder()

    @classmethod
    def load(cls, field: str, settings: ModelScorerSettings) -> "TorchScoreEngine":
        """Loads what the settings name. Raises `ValueError` that names the setting below `field` that is wrong."""
        device = choose_device(f"{field}.device", settings.device)
        found = find_checkpoint(f"{field}.model", settings.model, settings.revision)
        model = _load_classifier(f"{field}.model", found, settings.dtype, device)
        info = ModelInfo(
            name=found.name,
            revision=found.revision,
            vocab_size=model.config.get_text_config().vocab_size,
            max_sequence_tokens=sequence_limit(model.config, settings.max_sequence_tokens),
            dtype=str(model.dtype).removeprefix("torch."),
            eos_token_ids=eos_token_ids(model),
        )
        normalization = read_normalization(f"{field}.model", model.config)
        return cls(
            model,
            info,
            normalization=normalization,
            share_prefixes=settings.share_prefixes,
            num_workers=settings.num_workers,
        )

    @torch.inference_mode()
    def score(self, rows: Sequence[NDArray[np.int32]]) -> list[float]:
        """See `ScoreEngine.score`. A row that comes when nothing else runs gets all threads."""
        with self._threads.take(may_take_all=len(rows) == 1):
            if self.shares_prefixes:
                return self._score_packed(rows)
            return self._score_last_token(rows) if self._reads_last_token else self._score_by_model(rows)

    def close(self) -> None:
        """See `ScoreEngine.close`: the weights go with the object."""

    def _score_packed(self, rows: Sequence[NDArray[np.int32]]) -> list[float]:
        pack = pack_rows(rows)
        if self._decoder is not None:
            return self._read_head(self._decoder.run(pack, self.device)[: len(rows)])
        hidden = run_pack(self._transformer, pack, self.device)
        return self._read_head(hidden[torch.from_numpy(pack.last).to(self.device)])

    def _score_last_token(self, rows: Sequence[NDArray[np.int32]]) -> list[float]:
        hidden = self._transformer(input_ids=pad_rows(rows, self._pad_id, self.device), use_cache=False)
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        return self._read_head(hidden.last_hidden_state[torch.arange(len(rows), device=self.device), last])

    def _read_head(self, hidden_last: torch.Tensor) -> list[float]:
        """Scores of the last hidden states [rows, hidden size]."""
        assert self._head_weight is not None
        scores = torch.nn.functional.linear(hidden_last.float(), self._head_weight, self._head_bias)
        return list(scores.squeeze(-1).tolist())

    def _score_by_model(self, rows: Sequence[NDArray[np.int32]]) -> list[float]:
        """By the model's own forward pass, for encoders and architectures with a head of their own."""
        if self._classifier.config.get_text_config().pad_token_id is None and len(rows) > 1:
            return [score for row in rows for score in self._score_by_model([row])]
        mask = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.int64)
        for index, row in enumerate(rows):
            mask[index, : len(row)] = 1
        input_ids = pad_rows(rows, self._pad_id, self.device)
        logits = self._classifier(input_ids=input_ids, attention_mask=mask.to(self.device)).logits
        return list(logits[:, 0].float().tolist())

    def _can_pack(self) -> bool:
        """Whether packs give what the model's own forward pass gives; the model keeps the attention for them then."""
        try:
            with packed(self._classifier):
                if self._agrees_with_model(self._score_packed):
                    return True
                raise NotPackableError("scores of a pack differ")
        except (NotPackableError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            logger.info("rows are padded, and share nothing: %s", error)
            return False

    def _use_decoder(self) -> None:
        """Packs go through a forward pass of our own where there is one and it gives what the model's own gives."""
        try:
            self._decoder = PackedDecoder(self._transformer)
        except ValueError as error:
            logger.info("packs go through the modules of transformers: %s", error)
            return
        if not self._agrees_with_model(self._score_packed):
            self._decoder = None
            logger.info("packs go through the modules of transformers: scores of a shorter way differ")

    @torch.inference_mode()
    def _probe(self) -> tuple[list[NDArray[np.int32]], list[float]]:
        """Rows that share their beginnings in several ways, and the model's own scores, one row at a time."""
        usable = [token for token in range(min(12, self.model.vocab_size)) if token != self._pad_id]
        ids = np.resize(np.array(usable, np.int32), 3 * MIN_SHARED_TOKENS)
        shared, middle = ids[:MIN_SHARED_TOKENS], ids[:-5]
        rows = [ids, middle, np.concatenate([shared, ids[::-1][:7]]), np.concatenate([middle, ids[3:12]]), ids[4:9]]
        rows = [row[: self.model.max_sequence_tokens] for row in rows]
        return rows, [self._score_by_model([row])[0] for row in rows]

    @torch.inference_mode()
    def _agrees_with_model(self, score: Callable[[Sequence[NDArray[np.int32]]], list[float]]) -> bool:
        """Whether a way to compute gives what the model's own forward pass gives, row by row."""
        rows, own = self._expected
        try:
            fast = score(rows)
        except (TypeError, AttributeError, RuntimeError):
            return False
        tolerance = _TOLERANCE if self._classifier.dtype == torch.float32 else _TOLERANCE_HALF
        scale = max(1.0, *(abs(score) for score in own))
        # Weights that give NaN either way agree: such a model is reported when it is used.
        return all(
            not math.isfinite(expected) or abs(score - expected) <= tolerance * scale
            for score, expected in zip(fast, own, strict=True)
        )


def _load_classifier(field: str, found: Checkpoint, dtype: str, device: torch.device) -> Any:
    config = AutoConfig.from_pretrained(found.source)
    if config.num_labels != 1:
        raise ValueError(f"{field}: has {config.num_labels} labels, allowed: a sequence classifier with 1 label")
    return load_pretrained(field, AutoModelForSequenceClassification, found, dtype, device)


def read_normalization(field: str, config: Any) -> Normalization:
    """`reward_mean` and `reward_std` of a model configuration. `ValueError` if they cannot be used."""
    mean, std = getattr(config, "reward_mean", None), getattr(config, "reward_std", None)
    normalization = Normalization(mean=0.0 if mean is None else float(mean), std=1.0 if std is None else float(std))
    if not (math.isfinite(normalization.mean) and math.isfinite(normalization.std) and normalization.std > 0):
        raise ValueError(f"{field}: reward_mean is {mean}, reward_std is {std}, allowed: finite, and std above 0")
    return normalization
