"""vLLM's `AsyncLLM` as a `GenerationEngine`.

`start_engine` must run before the process has threads or a gRPC server: on CPU the engine core is forked,
which saves half of the start-up time. Samples of one request are separate requests to vLLM, so that each is
sent as soon as it ends; vLLM's own `n` would hold them back until the last has ended, and its prefix cache
shares the prompt anyway.

Every activation gets a new `cache_salt`. It is not the version alone: a request that was queued under the
old salt and started under the new weights leaves mixed blocks, which must not be found again after a
rollback.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from typing import Any

from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.inputs.engine import tokens_input
from vllm.outputs import CompletionOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

from steersman.policy.engine import model_files, orphans
from steersman.policy.engine.bond import Head
from steersman.policy.engine.config import engine_config
from steersman.policy.engine.options import EngineOptions
from steersman.policy.engine.port import (
    Activation,
    EngineDeadError,
    FinishReason,
    GenerationRequest,
    HostWeights,
    KvCachePolicy,
    ModelFacts,
    SampleDelta,
    WeightLoadError,
    sample_seed,
)
from steersman.policy.engine.spans import VersionTracker
from steersman.policy.engine.streams import groups_of, merge, stream_interval
from steersman.serving.tokenization import trusted
from steersman.wire.identity import ModelInfo, WeightVersion

_LOG = logging.getLogger(__name__)


def start_engine(options: EngineOptions) -> "VllmEngine":
    """Starts vLLM and waits until the model is loaded. `prepare_environment` comes first.

    Raises `ValueError` when the model does not fit the options, and what vLLM raises when it cannot start.
    """
    head = Head(options.nodes) if options.nodes is not None else None
    config = engine_config(options)
    with orphans.forks_end_with_us():
        llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    return VllmEngine(llm, options, head)


class VllmEngine:
    """A live vLLM engine; see `GenerationEngine` for what the methods promise."""

    def __init__(self, llm: AsyncLLM, options: EngineOptions, head: Head | None = None) -> None:
        self._llm = llm
        self._head = head
        self._options = options
        self._stages_beside = current_platform.is_cpu()
        self._tokenizer = _read_tokenizer(llm, options)
        self._facts = _read_facts(llm, options, self._tokenizer)
        self._stop_at_eos = self._facts.info.eos_token_ids
        self._version = WeightVersion()
        self._num_activations = 0
        self._session_open = False
        self._broken = False

    @property
    def facts(self) -> ModelFacts:
        """What is served."""
        return self._facts

    @property
    def num_unfinished(self) -> int:
        """Samples that are running or queued."""
        return self._llm.get_num_unfinished_requests()

    async def prepare(self) -> None:
        """Finishes starting on the event loop: stamps the start-up weights and builds their shadow."""
        await self._llm.update_weight_version(str(self._version))
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[SampleDelta, None]:
        """Samples, in the order in which tokens come. Aborts what is unfinished when closed or cancelled."""
        streams = [self._sample(request, index) for index in range(request.num_samples)]
        merged = streams[0] if len(streams) == 1 else merge(streams)
        async with contextlib.aclosing(merged):
            try:
                async for delta in merged:
                    yield delta
            except VllmEngineDeadError as error:
                raise EngineDeadError("the engine process died") from error

    async def _sample(self, request: GenerationRequest, index: int) -> AsyncGenerator[SampleDelta, None]:
        arrived = time.monotonic()
        tracker = VersionTracker(self._llm.output_processor, f"{request.request_id}/{index}")
        prompt = tokens_input(list(request.prompt_token_ids), cache_salt=f"{self._num_activations}:{self._version}")
        outputs = self._llm.generate(
            prompt,
            self._sampling_params(request, index),
            request_id=tracker.request_id,
            priority=request.priority,
        )
        first_token_s: float | None = None
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                (completion,) = output.outputs
                if first_token_s is None and completion.token_ids and not request.final_only:
                    first_token_s = time.monotonic() - arrived
                finished = completion.finish_reason is not None
                yield SampleDelta(
                    index=index,
                    token_ids=completion.token_ids,
                    logprobs=_logprobs(completion),
                    versions=tracker.advance(len(completion.token_ids), completion.weight_versions),
                    finish_reason=_finish_reason(completion.finish_reason),
                    stop_reason="" if completion.stop_reason is None else str(completion.stop_reason),
                    text=completion.text,
                    time_to_first_token_s=first_token_s if finished else None,
                )

    def _sampling_params(self, request: GenerationRequest, index: int) -> SamplingParams:
        eos = () if request.ignore_eos else self._stop_at_eos
        return SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=None if request.seed is None else sample_seed(request.seed, index),
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            stop=list(request.stop),
            stop_token_ids=[*eos, *(token for token in request.stop_token_ids if token not in eos)],
            # The model's end-of-sequence ids are among stop_token_ids, with or without a tokenizer.
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(request.stop) or request.return_text,
            stream_interval=stream_interval(self.num_unfinished),
            output_kind=RequestOutputKind.FINAL_ONLY if request.final_only else RequestOutputKind.DELTA,
        )

    def encode_text(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens as the tokenizer adds them."""
        return list(self._tokenizer.encode(text))

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of (role, content) turns with a generation prompt."""
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            rendered = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        return list(self._tokenizer.encode(rendered, add_special_tokens=False))

    def check_health(self) -> None:
        """Raises `EngineDeadError` when the engine died."""
        if self._llm.errored or self._broken:
            raise EngineDeadError("the engine died")
        if self._head is not None:
            self._head.check()

    async def stage(self, weights: HostWeights) -> None:
        """Fills the shadow between decode steps. Without a shadow (GPU) nothing can be prepared."""
        if self._stages_beside:
            await self._load(weights)

    async def _load(self, weights: HostWeights) -> None:
        await self.discard_staged()
        with _as_load_error("load"):
            await self._llm.start_weight_update()
            self._session_open = True
            try:
                await self._update(action="open")
                for group in groups_of(weights.slots, self._options.load_chunk_bytes):
                    slots = [(slot.name, slot.dtype, list(slot.shape), slot.offset_bytes) for slot in group]
                    await self._update(action="load", path=weights.path, slots=slots)
                num_parts = max(1, -(-weights.nbytes // self._options.load_chunk_bytes))
                for part in range(num_parts):
                    await self._update(action="pack", part=part, num_parts=num_parts)
            except Exception:
                # vLLM's worker closes a session whose update failed.
                self._session_open = False
                raise

    async def _update(self, **step: Any) -> None:
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=step))

    async def discard_staged(self) -> None:
        """Forgets what `stage` prepared."""
        if self._session_open:
            self._session_open = False
            with _as_load_error("discard"):
                await self._update(action="discard")
                await self._llm.finish_weight_update()

    async def activate(self, version: WeightVersion, weights: HostWeights, kv_cache: KvCachePolicy) -> Activation:
        """Swaps in what `stage` prepared (CPU), or loads `weights` into the live model (GPU)."""
        if self._stages_beside and not self._session_open:
            raise WeightLoadError("nothing is staged")
        load = None if self._stages_beside else lambda: self._load(weights)
        return await self._switch(version, kv_cache, load)

    async def rollback(self, version: WeightVersion, weights: HostWeights, kv_cache: KvCachePolicy) -> Activation:
        """Swaps back to the weights before the last `activate`."""
        if not self._stages_beside:
            return await self._switch(version, kv_cache, lambda: self._load(weights))
        await self.discard_staged()
        with _as_load_error("roll back"):
            await self._llm.start_weight_update()
            await self._update(action="restore")
        self._session_open = True
        return await self._switch(version, kv_cache, None)

    async def _switch(
        self, version: WeightVersion, kv_cache: KvCachePolicy, load: Callable[[], Awaitable[None]] | None
    ) -> Activation:
        core = self._llm.engine_core
        started = time.monotonic()
        # pause_generation of AsyncLLM does the same and then sleeps for 20 ms.
        await core.pause_scheduler_async(mode="keep", clear_cache=kv_cache is KvCachePolicy.RECOMPUTE)
        try:
            with _as_load_error("switch"):
                if load is not None:
                    # Fails only halfway through the live weights, which then are of no use.
                    self._broken = True
                    await load()
                    self._broken = False
                self._session_open = False
                await self._llm.finish_weight_update()
                await self._llm.update_weight_version(str(version))
            self._version = version
            self._num_activations += 1
        finally:
            num_running = self.num_unfinished
            await core.resume_scheduler_async()
        return Activation(pause_s=time.monotonic() - started, num_running_requests=num_running)

    async def shutdown(self) -> None:
        """Ends the engine and its processes, without blocking the event loop."""
        if self._llm.output_handler is not None:
            # Else it reports the death of the processes that we are about to end.
            self._llm.output_handler.cancel()
        if self._head is not None:
            self._head.close()
        await asyncio.to_thread(self._llm.shutdown, 5.0)


def _read_tokenizer(llm: AsyncLLM, options: EngineOptions) -> Any:
    """The tokenizer for prompts, responses and stop texts; None if the model has none."""
    if llm.model_config.skip_tokenizer_init:
        return None
    found: Any = llm.get_tokenizer()
    tokenizer = trusted(found, options.model)
    if tokenizer is not found:
        llm.output_processor.tokenizer = tokenizer
    return tokenizer


def _read_facts(llm: AsyncLLM, options: EngineOptions, tokenizer: Any) -> ModelFacts:
    config = llm.model_config
    eos_token_ids = model_files.eos_token_ids(options.model)
    if not eos_token_ids and getattr(tokenizer, "eos_token_id", None) is not None:
        eos_token_ids = (int(tokenizer.eos_token_id),)
    info = ModelInfo(
        name=options.served_name or options.model.name,
        vocab_size=config.get_vocab_size(),
        max_sequence_tokens=config.max_model_len,
        dtype=str(config.dtype).removeprefix("torch."),
        eos_token_ids=eos_token_ids,
    )
    return ModelFacts(
        info=info,
        has_tokenizer=tokenizer is not None,
        has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
    )


def _logprobs(completion: CompletionOutput) -> Sequence[float]:
    flat: Any = completion.logprobs
    return flat.logprobs if flat else ()


def _finish_reason(reason: str | None) -> FinishReason | None:
    match reason:
        case None:
            return None
        case "stop":
            return FinishReason.STOP
        case "length":
            return FinishReason.LENGTH
        case _:
            return FinishReason.ABORTED


@contextlib.contextmanager
def _as_load_error(step: str) -> Iterator[None]:
    """Turns what vLLM raises while it handles weights into `WeightLoadError`. A dead engine stays one."""
    try:
        yield
    except (WeightLoadError, EngineDeadError):
        raise
    except VllmEngineDeadError as error:
        raise EngineDeadError("the engine process died") from error
    except Exception as error:
        _LOG.exception("weights: %s failed", step)
        raise WeightLoadError(f"the engine could not {step} the weights: {error}") from error
