"""A scorer that is a scalar-head model: tokenizes on a thread of its own, batches across callers.

Score = (raw - mean) / std - length penalty: what the model says, normalised as was fitted for the model, less what the
settings take for a long response.
"""

import asyncio
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steersman.reward.cache import ScoreCache
from steersman.reward.engine.port import Normalization, ScoreEngine
from steersman.reward.settings import LengthPenaltySettings
from steersman.reward.text import Encoded, TextEncoder, shorten
from steersman.reward.types import (
    ChatContent,
    Content,
    Score,
    ScoreItem,
    ScoreOptions,
    ScorerKind,
    TextContent,
    TokenContent,
    check_content,
    failed,
)
from steersman.serving.arrangement import ByPrefix
from steersman.serving.batch_metrics import BatchObserver
from steersman.serving.batching import Batcher, BatchingSettings, Priority
from steersman.serving.service import EngineDead
from steersman.wire.errors import Reason, SteersmanError, invalid_field
from steersman.wire.identity import ModelInfo

# Runs of the model that failed one after the other, before it is asked for a sign of life.
_SUSPECT_AFTER_FAILURES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    token_ids: NDArray[np.int32]
    num_response_tokens: int
    truncated: bool


class ModelScorer:
    """Create it on the event loop that serves."""

    kind = ScorerKind.MODEL

    def __init__(
        self,
        name: str,
        engine: ScoreEngine,
        batching: BatchingSettings,
        *,
        encoder: TextEncoder | None = None,
        bos_token_id: int | None = None,
        stall_seconds: float = 300.0,
        observer: BatchObserver | None = None,
        normalization: Normalization | None = None,
        length_penalty: LengthPenaltySettings | None = None,
        cache: ScoreCache | None = None,
        tokenizer_digest: str = "",
        parameter_bytes: int = 0,
    ) -> None:
        """Without an `encoder` (a model without a tokenizer) only token ids can be scored.

        `normalization` stands for the engine's own. `tokenizer_digest` tells tokenizers apart; empty: not known.
        """
        self.name = name
        self.tokenizer_digest = tokenizer_digest
        self.parameter_bytes = parameter_bytes
        self._normalization = normalization or engine.normalization
        self._length_penalty = length_penalty
        self._cache = cache
        self._engine = engine
        self._encoder = encoder
        self._bos_token_id = bos_token_id
        self._stall_seconds = stall_seconds
        # One thread: tokenizers are not thread-safe, and a fast one uses all cores for a batch anyway.
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"tokenizer-{name}")
        arrangement = ByPrefix[_Job](lambda job: job.token_ids) if engine.shares_prefixes else None
        self._batcher: Batcher[_Job, Score] = Batcher(
            self._score, batching, name=name, observer=observer, arrangement=arrangement, num_workers=engine.num_workers
        )

    @property
    def model(self) -> ModelInfo:
        """See `Scorer.model`."""
        return self._engine.model

    async def warm_up(self) -> bool:
        """Runs a few batches, so that the first caller does not pay for the first use of a kernel.

        Returns whether all scores were finite.
        """
        longest = min(256, self.model.max_sequence_tokens)
        return all([await self._probe(length) for length in sorted({min(16, longest), longest})])

    async def submit(self, items: Sequence[ScoreItem], options: ScoreOptions) -> "list[asyncio.Future[Score]]":
        """See `Scorer.submit`."""
        jobs: list[_Job | SteersmanError | None] = [None] * len(items)
        texts: list[tuple[int, TextContent | ChatContent]] = []
        for index, item in enumerate(items):
            content = item.content
            error = check_content(index, content)
            if error is not None:
                jobs[index] = error
            elif isinstance(content, TokenContent):
                encoded = Encoded(
                    token_ids=np.concatenate([content.prompt, content.response]), num_prompt_tokens=len(content.prompt)
                )
                jobs[index] = self._fit(index, content, encoded, options)
            elif self._encoder is None:
                jobs[index] = invalid_field(f"items[{index}].content", "text or chat", "tokens: it has no tokenizer")
            elif content is not None:
                texts.append((index, content))
        if texts and self._encoder is not None:
            loop = asyncio.get_running_loop()
            contents = [content for _, content in texts]
            found = await loop.run_in_executor(self._tokenizing, self._encoder.encode, contents)
            for (index, content), encoded_or_error in zip(texts, found, strict=True):
                if isinstance(encoded_or_error, Encoded):
                    jobs[index] = self._fit(index, content, encoded_or_error, options)
                else:
                    jobs[index] = invalid_field(f"items[{index}].chat", "a conversation", str(encoded_or_error))
        return self._enqueue(items, jobs, options)

    async def check_health(self) -> None:
        """Raises ENGINE_UNAVAILABLE if the worker is stuck, `EngineDead` if the model cannot score any more."""
        self._batcher.check_health(self._stall_seconds)
        if self._batcher.num_failures_in_a_row >= _SUSPECT_AFTER_FAILURES:
            try:
                await self._probe(1)
            except Exception as error:
                raise EngineDead(f"scorer {self.name} fails at everything") from error

    async def close(self) -> None:
        """See `Scorer.close`."""
        await self._batcher.close()
        await asyncio.to_thread(self._engine.close)
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    def _enqueue(
        self, items: Sequence[ScoreItem], jobs: Sequence[_Job | SteersmanError | None], options: ScoreOptions
    ) -> "list[asyncio.Future[Score]]":
        pairs = [(job, item.timeout_s) for job, item in zip(jobs, items, strict=True) if isinstance(job, _Job)]
        good, timeouts_s = [job for job, _ in pairs], [timeout_s for _, timeout_s in pairs]
        if not good:
            queued: list[asyncio.Future[Score]] = []
        elif self._cache is None:
            queued = self._run(good, options.priority, timeouts_s)
        else:
            queued = self._cache.submit(
                [job.token_ids for job in good],
                priority=options.priority,
                timeouts_s=timeouts_s,
                start=lambda chosen: self._run([good[index] for index in chosen], options.priority),
                score=lambda index, raw: self._to_score(good[index], raw),
            )
        rest = iter(queued)
        return [failed(job) if isinstance(job, SteersmanError) else next(rest) for job in jobs]

    def _run(
        self, jobs: Sequence[_Job], priority: Priority, timeouts_s: Sequence[float | None] | None = None
    ) -> "list[asyncio.Future[Score]]":
        lengths = [len(job.token_ids) for job in jobs]
        return self._batcher.submit(jobs, lengths, priority=priority, timeouts_s=timeouts_s)

    def _fit(self, index: int, content: Content, encoded: Encoded, options: ScoreOptions) -> _Job | SteersmanError:
        """The job of an item whose tokens are known, if they are of the vocabulary and not too many."""
        ids, vocab_size, limit = encoded.token_ids, self.model.vocab_size, self.model.max_sequence_tokens
        if ids.min() < 0 or ids.max() >= vocab_size:
            return _outside_vocabulary(index, content, ids, vocab_size)
        num_response_tokens = len(ids) - encoded.num_prompt_tokens
        if len(ids) <= limit:
            return _Job(token_ids=ids, num_response_tokens=num_response_tokens, truncated=False)
        if not options.truncate_prompt:
            return invalid_field(
                f"items[{index}]", f"{len(ids)} tokens", f"at most {limit} tokens", reason=Reason.SEQUENCE_TOO_LONG
            )
        shorter = shorten(encoded, limit, self._bos_token_id)
        if shorter is None:
            response = f"a response of {num_response_tokens} tokens"
            return invalid_field(
                f"items[{index}]", response, f"at most {limit} tokens", reason=Reason.SEQUENCE_TOO_LONG
            )
        return _Job(token_ids=shorter.token_ids, num_response_tokens=num_response_tokens, truncated=True)

    async def _probe(self, num_tokens: int) -> bool:
        ids = np.arange(num_tokens, dtype=np.int32) % self.model.vocab_size
        job = _Job(token_ids=ids, num_response_tokens=0, truncated=False)
        outcomes = await asyncio.gather(*self._run([job, job], Priority.INTERACTIVE), return_exceptions=True)
        for outcome in outcomes:
            # A model that gives NaN does run: its items fail, one by one, with that reason.
            if isinstance(outcome, BaseException) and not isinstance(outcome, SteersmanError):
                raise outcome
        return all(isinstance(outcome, Score) for outcome in outcomes)

    def _score(self, jobs: Sequence[_Job]) -> list[Score | Exception]:
        """On a worker thread."""
        outcomes: list[Score | Exception] = []
        for job, raw in zip(jobs, self._engine.score([job.token_ids for job in jobs]), strict=True):
            score = self._to_score(job, raw)
            if math.isfinite(score.value):
                outcomes.append(score)
            else:
                outcomes.append(SteersmanError(Reason.NOT_FINITE, f"scorer {self.name} gave {raw} for the item"))
        return outcomes

    def _to_score(self, job: _Job, raw: float) -> Score:
        penalty = self._length_penalty.of(job.num_response_tokens) if self._length_penalty is not None else None
        return Score(
            value=self._normalization.apply(raw) - (penalty or 0.0),
            raw=raw,
            num_tokens=len(job.token_ids),
            truncated=job.truncated,
            length_penalty=penalty,
        )


def _outside_vocabulary(index: int, content: Content, ids: NDArray[np.int32], vocab_size: int) -> SteersmanError:
    position = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
    field, at = f"items[{index}]", position
    if isinstance(content, TokenContent):
        num_prompt = len(content.prompt)
        field += ".tokens.prompt.ids" if position < num_prompt else ".tokens.response.ids"
        at = position if position < num_prompt else position - num_prompt
    return invalid_field(
        f"{field}[{at}]", int(ids[position]), f"0 to {vocab_size - 1}", reason=Reason.TOKEN_OUT_OF_VOCABULARY
    )
