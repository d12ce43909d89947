"""Checks a request for log-probs, and sends its rows to the batcher that all callers share."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steersman.reference.engine.port import LogprobEngine, LogprobQuery, LogprobRow
from steersman.serving.arrangement import ByPrefix
from steersman.serving.batch_metrics import BatchObserver
from steersman.serving.batching import Batcher, BatchingSettings, Priority
from steersman.serving.service import EngineDead
from steersman.wire.errors import Reason, SteersmanError, invalid_field
from steersman.wire.identity import ModelInfo
from steersman.wire.limits import MAX_BATCH_ITEMS, MAX_TEMPERATURE, MIN_TEMPERATURE, is_temperature

# Runs of the model that failed one after the other, before it is asked for a sign of life.
_SUSPECT_AFTER_FAILURES = 8


@dataclass(frozen=True, kw_only=True)
class LogprobRequest:
    """Sequences (int32 rows), where their responses start (default: at 1), and what to compute."""

    token_ids: Sequence[NDArray[np.int32]]
    prompt_lengths: NDArray[np.int32] | None = None
    temperature: float = 1.0
    include_entropy: bool = False


class ReferenceHandler:
    """Create it on the event loop that serves; `close` ends its worker."""

    def __init__(
        self,
        engine: LogprobEngine,
        batching: BatchingSettings,
        *,
        stall_seconds: float = 300.0,
        observer: BatchObserver | None = None,
    ) -> None:
        self._engine = engine
        self._stall_seconds = stall_seconds
        arrangement = ByPrefix[LogprobQuery](lambda query: query.token_ids) if engine.shares_prefixes else None
        self._batcher: Batcher[LogprobQuery, LogprobRow] = Batcher(
            self._compute, batching, name="reference", observer=observer, arrangement=arrangement
        )

    @property
    def model(self) -> ModelInfo:
        """The model that is served."""
        return self._engine.model

    async def warm_up(self) -> None:
        """Runs a few batches on the worker, so that the first caller does not pay for the first use of a kernel."""
        longest = min(256, self.model.max_sequence_tokens)
        for length in sorted({min(16, longest), longest}):
            await self._probe(length)

    async def compute_logprobs(self, request: LogprobRequest) -> list[LogprobRow]:
        """One row a sequence, in order.

        Raises `SteersmanError`: INVALID_FIELD, SEQUENCE_TOO_LONG, TOKEN_OUT_OF_VOCABULARY or REQUEST_TOO_LARGE naming
        the row, QUEUE_FULL, ENGINE_UNAVAILABLE, NOT_FINITE.
        """
        lengths = check(request, self.model)
        prompt_lengths = request.prompt_lengths.tolist() if request.prompt_lengths is not None else [1] * len(lengths)
        queries = [
            LogprobQuery(
                token_ids=token_ids,
                prompt_length=prompt_length,
                temperature=request.temperature,
                include_entropy=request.include_entropy,
            )
            for token_ids, prompt_length in zip(request.token_ids, prompt_lengths, strict=True)
        ]
        return await self._batcher.run(queries, lengths)

    async def check_health(self) -> None:
        """Raises ENGINE_UNAVAILABLE if the worker is stuck, `EngineDead` if the model cannot compute any more."""
        self._batcher.check_health(self._stall_seconds)
        if self._batcher.num_failures_in_a_row >= _SUSPECT_AFTER_FAILURES:
            try:
                await self._probe(2)
            except Exception as error:
                raise EngineDead("the model fails at everything") from error

    async def close(self) -> None:
        """Fails what waits and ends the worker."""
        await self._batcher.close()

    async def _probe(self, num_tokens: int) -> None:
        ids = np.arange(num_tokens, dtype=np.int32) % self.model.vocab_size
        queries = [LogprobQuery(token_ids=ids, prompt_length=1)] * 2
        futures = self._batcher.submit(queries, [num_tokens] * 2, priority=Priority.INTERACTIVE)
        for outcome in await asyncio.gather(*futures, return_exceptions=True):
            # A model that gives NaN does run: the calls fail, one by one, with that reason.
            if isinstance(outcome, BaseException) and not isinstance(outcome, SteersmanError):
                raise outcome

    def _compute(self, queries: Sequence[LogprobQuery]) -> list[LogprobRow | Exception]:
        """On the worker thread."""
        return [row if _is_finite(row) else _not_finite() for row in self._engine.compute(queries)]


def check(request: LogprobRequest, model: ModelInfo) -> list[int]:
    """Lengths of the rows in tokens, if all is well. Raises `SteersmanError` naming the first bad field."""
    rows = request.token_ids
    if not rows:
        raise invalid_field("token_ids", "no rows", f"1 to {MAX_BATCH_ITEMS} rows")
    if len(rows) > MAX_BATCH_ITEMS:
        raise invalid_field(
            "token_ids", f"{len(rows)} rows", f"1 to {MAX_BATCH_ITEMS} rows", reason=Reason.REQUEST_TOO_LARGE
        )
    if not is_temperature(request.temperature):
        raise invalid_field("temperature", request.temperature, f"[{MIN_TEMPERATURE}, {MAX_TEMPERATURE:g}]")
    lengths = [len(row) for row in rows]
    if min(lengths) < 2:
        index = next(index for index, length in enumerate(lengths) if length < 2)
        raise invalid_field(f"token_ids[{index}]", f"{lengths[index]} tokens", "at least 2 tokens")
    if max(lengths) > model.max_sequence_tokens:
        index = next(index for index, length in enumerate(lengths) if length > model.max_sequence_tokens)
        allowed = f"at most {model.max_sequence_tokens} tokens"
        raise invalid_field(f"token_ids[{index}]", f"{lengths[index]} tokens", allowed, reason=Reason.SEQUENCE_TOO_LONG)
    _check_prompt_lengths(request.prompt_lengths, lengths)
    _check_vocabulary(rows, model.vocab_size)
    return lengths


def _check_prompt_lengths(prompt_lengths: NDArray[np.int32] | None, lengths: Sequence[int]) -> None:
    if prompt_lengths is None:
        return
    if prompt_lengths.shape != (len(lengths),):
        raise invalid_field("prompt_lengths.shape", list(prompt_lengths.shape), f"[{len(lengths)}], one for each row")
    bad = np.flatnonzero((prompt_lengths < 1) | (prompt_lengths >= np.asarray(lengths)))
    if bad.size:
        index = int(bad[0])
        allowed = f"1 to {lengths[index] - 1}, so that a response token is left"
        raise invalid_field(f"prompt_lengths[{index}]", int(prompt_lengths[index]), allowed)


def _check_vocabulary(rows: Sequence[NDArray[np.int32]], vocab_size: int) -> None:
    flat = np.concatenate(rows)
    if flat.min() >= 0 and flat.max() < vocab_size:
        return
    for index, row in enumerate(rows):
        bad = np.flatnonzero((row < 0) | (row >= vocab_size))
        if bad.size:
            position = int(bad[0])
            raise invalid_field(
                f"token_ids[{index}][{position}]",
                int(row[position]),
                f"0 to {vocab_size - 1}",
                reason=Reason.TOKEN_OUT_OF_VOCABULARY,
            )


def _is_finite(row: LogprobRow) -> bool:
    return bool(np.isfinite(row.logprobs).all()) and (row.entropies is None or bool(np.isfinite(row.entropies).all()))


def _not_finite() -> SteersmanError:
    return SteersmanError(Reason.NOT_FINITE, "the model gave NaN or infinity for a sequence of the request")
