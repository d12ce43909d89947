"""Checks what callers ask for and runs it on the engine. Knows neither gRPC nor protobuf."""

import contextlib
import dataclasses
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from steersman.policy.engine.port import MAX_SEED, EngineDeadError, GenerationEngine, GenerationRequest, SampleDelta
from steersman.policy.metrics import PolicyMetrics
from steersman.wire.errors import (
    FieldViolation,
    Reason,
    SteersmanError,
    invalid_field,
    queue_full,
    unavailable,
)
from steersman.wire.identity import ModelInfo, WeightVersion
from steersman.wire.limits import (
    MAX_SAMPLES_PER_PROMPT,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    is_temperature,
)

_QUEUE_RETRY_S: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class GenerateCall:
    """What a caller asks for, unchecked. Exactly one of the three prompts is set; None is the default
    value.
    """

    prompt_token_ids: Sequence[int] | None = None
    chat: Sequence[tuple[str, str]] | None = None
    text: str | None = None
    num_samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    final_only: bool = False
    priority: int = 0
    return_text: bool = False


class GenerationHandler:
    """Generation on one engine, with a bounded queue."""

    def __init__(
        self,
        engine: GenerationEngine,
        metrics: PolicyMetrics,
        *,
        active_version: Callable[[], WeightVersion],
        revision: str,
        max_samples: int,
    ) -> None:
        """`max_samples` may be running or queued at once; `revision` names the start-up checkpoint."""
        self._engine = engine
        self._metrics = metrics
        self._active_version = active_version
        self._info = dataclasses.replace(engine.facts.info, revision=revision)
        self._max_samples = max_samples
        self._num_samples = 0
        self._num_tokens = 0

    @property
    def num_samples(self) -> int:
        """Samples that are running or queued."""
        return self._num_samples

    @property
    def num_tokens(self) -> int:
        """Tokens that these may come to hold: their prompts, and what each may sample at most."""
        return self._num_tokens

    def model(self) -> ModelInfo:
        """The model with the weights that are active now."""
        return dataclasses.replace(self._info, weight_version=self._active_version())

    def check(self, call: GenerateCall) -> GenerationRequest:
        """The request for the engine.

        Raises INVALID_FIELD, TOKEN_OUT_OF_VOCABULARY or SEQUENCE_TOO_LONG, naming field, value and what is
        allowed.
        """
        prompt = self._prompt(call)
        self._check_sampling(call)
        room = self._info.max_sequence_tokens - len(prompt)
        if room < 1:
            allowed = f"at most {self._info.max_sequence_tokens - 1}, to leave room for a token"
            raise invalid_field("prompt", f"{len(prompt)} tokens", allowed, reason=Reason.SEQUENCE_TOO_LONG)
        max_tokens = room if call.max_tokens is None else call.max_tokens
        if max_tokens > room:
            allowed = f"[1, {room}] after a prompt of {len(prompt)} tokens"
            raise invalid_field("sampling.max_tokens", max_tokens, allowed, reason=Reason.SEQUENCE_TOO_LONG)
        min_tokens = call.min_tokens or 0
        if not 0 <= min_tokens <= max_tokens:
            raise invalid_field("sampling.min_tokens", min_tokens, f"[0, {max_tokens}]")
        return GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            num_samples=1 if call.num_samples is None else call.num_samples,
            temperature=1.0 if call.temperature is None else call.temperature,
            top_p=1.0 if call.top_p is None else call.top_p,
            top_k=call.top_k or 0,
            seed=call.seed,
            stop=tuple(call.stop),
            stop_token_ids=tuple(call.stop_token_ids),
            ignore_eos=call.ignore_eos,
            priority=call.priority,
            final_only=call.final_only,
            return_text=call.return_text,
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[SampleDelta, None]:
        """Samples as they come; closing the iterator aborts them.

        Raises QUEUE_FULL or ENGINE_UNAVAILABLE.
        """
        if self._num_samples and self._num_samples + request.num_samples > self._max_samples:
            raise queue_full("the queue of samples", self._max_samples, _QUEUE_RETRY_S)
        num_tokens = request.num_samples * (len(request.prompt_token_ids) + request.max_tokens)
        self._num_samples += request.num_samples
        self._num_tokens += num_tokens
        try:
            self._metrics.accepted(len(request.prompt_token_ids))
            async with contextlib.aclosing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    self._metrics.sampled(delta)
                    yield delta
        except EngineDeadError as error:
            raise unavailable("the engine died; a new one is on its way") from error
        finally:
            self._num_samples -= request.num_samples
            self._num_tokens -= num_tokens

    def _prompt(self, call: GenerateCall) -> Sequence[int]:
        facts = self._engine.facts
        if call.prompt_token_ids is not None:
            return self._checked_ids(call.prompt_token_ids)
        if call.text is not None:
            if not facts.has_tokenizer:
                raise invalid_field("text", call.text, "prompt_token_ids; this model has no tokenizer")
            return self._checked_tokens("text", call.text, self._engine.encode_text(call.text))
        if call.chat is not None:
            if not facts.has_chat_template:
                allowed = "prompt_token_ids or text; this model has no chat template"
                raise invalid_field("chat", f"{len(call.chat)} messages", allowed)
            if not call.chat:
                raise invalid_field("chat.messages", [], "at least one message")
            try:
                ids = self._engine.encode_chat(call.chat)
            except ValueError as error:
                raise invalid_field("chat.messages", str(error), "turns that the template takes") from error
            return self._checked_tokens("chat", f"{len(call.chat)} messages", ids)
        raise invalid_field("prompt", None, "one of prompt_token_ids, chat and text")

    def _checked_ids(self, ids: Sequence[int]) -> Sequence[int]:
        if not ids:
            raise invalid_field("prompt_token_ids.ids", [], "at least one token")
        self._check_vocabulary("prompt_token_ids.ids", ids)
        return ids

    def _checked_tokens(self, field: str, value: str, ids: Sequence[int]) -> Sequence[int]:
        """The tokens of a prompt that came as text. None at all is the text's fault or the tokenizer's."""
        if not ids:
            allowed = "a prompt of at least one token; the tokenizer of this model makes none of it"
            raise invalid_field(field, value, allowed)
        self._check_vocabulary(field, ids)
        return ids

    def _check_vocabulary(self, field: str, ids: Sequence[int]) -> None:
        size = self._info.vocab_size
        if ids and (min(ids) < 0 or max(ids) >= size):
            index = next(index for index, token in enumerate(ids) if not 0 <= token < size)
            raise invalid_field(f"{field}[{index}]", ids[index], f"[0, {size})", reason=Reason.TOKEN_OUT_OF_VOCABULARY)

    def _check_sampling(self, call: GenerateCall) -> None:
        temperature, top_p = call.temperature, call.top_p
        has_tokenizer = self._engine.facts.has_tokenizer
        checks = [
            (call.num_samples is None or 1 <= call.num_samples <= MAX_SAMPLES_PER_PROMPT)
            or ("num_samples", call.num_samples, f"[1, {MAX_SAMPLES_PER_PROMPT}]"),
            (not temperature or is_temperature(temperature))
            or ("temperature", temperature, f"0, or [{MIN_TEMPERATURE}, {MAX_TEMPERATURE:g}]"),
            (top_p is None or 0 < top_p <= 1) or ("top_p", top_p, "(0, 1]"),
            (call.top_k is None or call.top_k >= 0) or ("top_k", call.top_k, "at least 0; 0 is off"),
            (call.max_tokens is None or call.max_tokens >= 1) or ("max_tokens", call.max_tokens, "at least 1"),
            (call.seed is None or 0 <= call.seed <= MAX_SEED) or ("seed", call.seed, f"[0, {MAX_SEED}]"),
            len(call.stop) <= MAX_STOP_STRINGS or ("stop", f"{len(call.stop)} texts", f"at most {MAX_STOP_STRINGS}"),
            all(call.stop) or ("stop", list(call.stop), "texts that are not empty"),
            (not call.stop or has_tokenizer) or ("stop", list(call.stop), "none; this model has no tokenizer"),
            len(call.stop_token_ids) <= MAX_STOP_TOKEN_IDS
            or ("stop_token_ids", f"{len(call.stop_token_ids)} ids", f"at most {MAX_STOP_TOKEN_IDS}"),
        ]
        if violations := [
            FieldViolation(field=f"sampling.{name}", description=f"is {value!r}, allowed: {allowed}")
            for name, value, allowed in (check for check in checks if isinstance(check, tuple))
        ]:
            message = "; ".join(f"{violation.field} {violation.description}" for violation in violations)
            raise SteersmanError(Reason.INVALID_FIELD, message, violations=violations)
        self._check_vocabulary("sampling.stop_token_ids", call.stop_token_ids)
        if call.return_text and not has_tokenizer:
            raise invalid_field("return_text", True, "false; this model has no tokenizer")
