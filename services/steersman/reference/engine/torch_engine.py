"""Log-probs under a Hugging Face causal language model in PyTorch.

The transformer runs on the whole batch, the vocabulary projection only on positions that predict a response token,
a chunk of positions at a time: a float32 [tokens, vocabulary] tensor never exists for a whole batch.

On a CPU, where there is a forward pass for the architecture that gives what the model's own gives, rows are packed one
behind the other, common beginnings once; else they are padded on the right.

Shape suffixes: B rows, L longest row, H hidden size, N response tokens of the batch, C of one chunk, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from steersman.reference.engine.port import LogprobQuery, LogprobRow
from steersman.reference.settings import ReferenceSettings
from steersman.serving.models import (
    choose_device,
    eos_token_ids,
    find_checkpoint,
    load_pretrained,
    pad_rows,
    pad_token_id,
    sequence_limit,
    use_threads,
)
from steersman.serving.packed_attention import NotPackableError, packed, run_pack
from steersman.serving.packed_decoder import PackedDecoder
from steersman.serving.packing import pack_rows
from steersman.serving.prefixes import MIN_SHARED_TOKENS
from steersman.wire.identity import ModelInfo

logger = logging.getLogger(__name__)

# Largest difference between this engine and the model's own forward pass that rounding explains.
_TOLERANCE: Final = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_HALF: Final = 0.15

_MIB: Final = 1024 * 1024


class TorchLogprobEngine:
    """A causal language model, in evaluation mode, on one device."""

    def __init__(self, model: Any, info: ModelInfo, *, logits_chunk_bytes: int = 32 * _MIB) -> None:
        """`model` is a `PreTrainedModel` with an output embedding.

        Raises `ValueError` if it does not compute its logits as head(transformer(tokens)), or is not causal.
        """
        self.model = info
        self._causal_lm = model.eval()
        self._transformer = model.base_model
        self._head = model.get_output_embeddings()
        self._post_process = _logit_transform(model.config.get_text_config())
        self.device = next(model.parameters()).device
        self._pad_id = pad_token_id(model.config)
        chunk_tokens = max(1, logits_chunk_bytes // (4 * info.vocab_size))
        self._chunk_tokens = chunk_tokens - chunk_tokens % 8 or chunk_tokens
        self._decoder: PackedDecoder | None = None
        self._verify()
        # On accelerators a pass over padded rows takes fewer kernels.
        if self.device.type == "cpu":
            self._use_decoder()

    @property
    def shares_prefixes(self) -> bool:
        """See `LogprobEngine.shares_prefixes`."""
        return self._decoder is not None

    @classmethod
    def load(cls, settings: ReferenceSettings) -> "TorchLogprobEngine":
        """Loads what the settings name. Raises `ValueError` naming the setting that is wrong."""
        use_threads(settings.num_threads)
        device = choose_device("device", settings.device)
        found = find_checkpoint("model", settings.model, settings.revision)
        model = load_pretrained("model", AutoModelForCausalLM, found, settings.dtype, device)
        info = ModelInfo(
            name=settings.name or found.name,
            revision=found.revision,
            vocab_size=model.config.get_text_config().vocab_size,
            max_sequence_tokens=sequence_limit(model.config, settings.max_sequence_tokens),
            dtype=str(model.dtype).removeprefix("torch."),
            eos_token_ids=eos_token_ids(model),
        )
        return cls(model, info, logits_chunk_bytes=settings.logits_chunk_mib * _MIB)

    @torch.inference_mode()
    def compute(self, queries: Sequence[LogprobQuery]) -> list[LogprobRow]:
        """See `LogprobEngine.compute`."""
        counts = np.array([len(query.token_ids) - query.prompt_length for query in queries])
        temperatures = np.array([query.temperature for query in queries], np.float32)
        hidden_NH = self._padded_states(queries, counts) if self._decoder is None else self._packed_states(queries)
        # States of no position may stand behind the others; what they predict is not read.
        more = (0, len(hidden_NH) - int(counts.sum()))
        temperature_N = None
        if np.any(temperatures != 1.0):
            repeated = np.pad(np.repeat(temperatures, counts), more, constant_values=1)
            temperature_N = torch.from_numpy(repeated).to(self.device)
        targets = np.concatenate([query.token_ids[query.prompt_length :] for query in queries])
        targets_N = torch.from_numpy(np.pad(targets.astype(np.int64), more)).to(self.device)
        with_entropy = any(query.include_entropy for query in queries)
        logprobs_N, entropies_N = self._project(hidden_NH, targets_N, temperature_N, with_entropy)

        ends = np.cumsum(counts)
        logprobs = np.split(logprobs_N.cpu().numpy(), ends)
        entropies = np.split(entropies_N.cpu().numpy(), ends) if entropies_N is not None else None
        return [
            LogprobRow(
                logprobs=logprobs[index],
                entropies=entropies[index] if entropies is not None and query.include_entropy else None,
            )
            for index, query in enumerate(queries)
        ]

    def _padded_states(self, queries: Sequence[LogprobQuery], counts: NDArray[np.int64]) -> torch.Tensor:
        """Hidden states that predict the response tokens, row by row, from rows padded to the longest."""
        ids_BL = pad_rows([query.token_ids for query in queries], self._pad_id, self.device)
        # The last prompt token predicts the first response token.
        starts = np.array([query.prompt_length - 1 for query in queries]) + ids_BL.shape[1] * np.arange(len(queries))
        positions_N = torch.from_numpy(_ranges(starts, counts)).to(self.device)
        hidden_BLH = self._transformer(input_ids=ids_BL, use_cache=False).last_hidden_state
        states_NH: torch.Tensor = hidden_BLH.flatten(0, 1)[positions_N]
        return states_NH

    def _packed_states(self, queries: Sequence[LogprobQuery]) -> torch.Tensor:
        """The same from rows without padding, common beginnings computed once; states of no meaning may follow."""
        assert self._decoder is not None
        pack = pack_rows([query.token_ids for query in queries])
        places = [
            np.concatenate([np.arange(start, stop) for start, stop in spans])[query.prompt_length - 1 : -1]
            for query, spans in zip(queries, pack.row_spans(), strict=True)
        ]
        return self._decoder.run(pack, self.device, np.concatenate(places))

    def _project(
        self,
        hidden_NH: torch.Tensor,
        targets_N: torch.Tensor,
        temperature_N: torch.Tensor | None,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """float32 log-probs of the targets and, if asked for, entropies, a chunk of positions at a time."""
        logprobs_N = torch.empty(len(targets_N), dtype=torch.float32, device=self.device)
        entropies_N = torch.empty_like(logprobs_N) if with_entropy else None
        for start in range(0, len(targets_N), self._chunk_tokens):
            part = slice(start, start + self._chunk_tokens)
            logits_CV = self._post_process(self._head(hidden_NH[part]).float())
            if temperature_N is not None:
                logits_CV = logits_CV / temperature_N[part, None]
            log_partition_C = torch.logsumexp(logits_CV, dim=-1)
            target_logits_C = logits_CV.gather(1, targets_N[part, None]).squeeze(1)
            # Rounding can leave the log of a sure event just above 0.
            logprobs_N[part] = (target_logits_C - log_partition_C).clamp_(max=0)
            if entropies_N is not None:
                # entr(0) is 0, where p * log p would be NaN for a token that is masked out.
                probabilities_CV = (logits_CV - log_partition_C[:, None]).exp_()
                entropies_N[part] = torch.special.entr(probabilities_CV).sum(dim=-1)
        return logprobs_N, entropies_N

    @torch.inference_mode()
    def _verify(self) -> None:
        """Compares with the model's own forward pass, one row at a time; some architectures change their logits."""
        vocab_size = self.model.vocab_size
        length = min(9, self.model.max_sequence_tokens)
        long = np.arange(1, 1 + length, dtype=np.int32) % vocab_size
        queries = [LogprobQuery(token_ids=row, prompt_length=1) for row in (long, long[: max(2, length // 2)])]
        for query, row in zip(queries, self.compute(queries), strict=True):
            ids_1L = torch.from_numpy(query.token_ids.astype(np.int64)).to(self.device)[None]
            logits_LV = self._causal_lm(input_ids=ids_1L, use_cache=False).logits[0, :-1].float()
            expected = logits_LV.log_softmax(-1).gather(1, ids_1L[0, 1:, None]).squeeze(1).cpu().numpy()
            # Where broken weights give NaN there is nothing to compare; such a model is reported when it is used.
            both = np.isfinite(expected) & np.isfinite(row.logprobs)
            difference = float(np.max(np.abs(row.logprobs[both] - expected[both]), initial=0.0))
            if difference > _TOLERANCE.get(self._causal_lm.dtype, _TOLERANCE_HALF):
                kind = type(self._causal_lm).__name__
                raise ValueError(
                    f"model: {kind} cannot be served: log-probs differ from its own by {difference:.2g}; "
                    "allowed: a causal model whose logits are the output embedding of its last hidden state"
                )

    @torch.inference_mode()
    def _use_decoder(self) -> None:
        """Rows go through a forward pass without padding where there is one and it gives what the model's own gives."""
        rows = _probe_rows(self.model.vocab_size, self.model.max_sequence_tokens)
        queries = [
            LogprobQuery(token_ids=row, prompt_length=1 + index % (len(row) - 1)) for index, row in enumerate(rows)
        ]
        expected = np.concatenate([row.logprobs for row in self.compute(queries)])
        try:
            with packed(self._causal_lm):
                # Refuses what is more than plain causal attention, which rows as short as these need not show.
                run_pack(self._transformer, pack_rows(rows), self.device)
                self._decoder = PackedDecoder(self._transformer)
                packed_rows = np.concatenate([row.logprobs for row in self.compute(queries)])
                # What is not finite is reported when the model is used.
                both = np.isfinite(expected) & np.isfinite(packed_rows)
                largest = float(np.max(np.abs(packed_rows[both] - expected[both]), initial=0.0))
                if largest > _TOLERANCE.get(self._causal_lm.dtype, _TOLERANCE_HALF):
                    raise NotPackableError(f"log-probs of a pack differ by {largest:.2g}")
        except (NotPackableError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            self._decoder = None
            logger.info("rows are padded, and share nothing: %s", error)


def _probe_rows(vocab_size: int, max_tokens: int) -> list[NDArray[np.int32]]:
    """Rows that share their beginnings in several ways."""
    ids = np.resize(np.arange(min(12, vocab_size), dtype=np.int32), 3 * MIN_SHARED_TOKENS)
    shared, middle = ids[:MIN_SHARED_TOKENS], ids[:-5]
    rows = [ids, middle, np.concatenate([shared, ids[::-1][:7]]), np.concatenate([middle, ids[3:12]]), ids[4:9]]
    return [row[:max_tokens] for row in rows]


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """arange(starts[0], starts[0] + counts[0]) followed by the same for the others."""
    ends = np.cumsum(counts)
    ranges: NDArray[np.int64] = np.arange(ends[-1], dtype=np.int64) + np.repeat(starts - (ends - counts), counts)
    return ranges


def _logit_transform(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the architecture does to its logits after the projection."""
    multiplier = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1
    )
    cap = getattr(config, "final_logit_softcapping", None)

    def transform(logits: torch.Tensor) -> torch.Tensor:
        if multiplier != 1.0:
            logits = logits * multiplier
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    return transform
