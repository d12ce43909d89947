"""Makes the scorers that the settings name, and models by request."""

import asyncio
import contextlib
import ctypes
import gc
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from steersman.reward.cache import CacheMetrics, ScoreCache
from steersman.reward.engine.footprint import check_memory
from steersman.reward.engine.normalization import stored_normalization
from steersman.reward.engine.port import LoadedEngine, Normalization
from steersman.reward.engine.torch_engine import TorchScoreEngine
from steersman.reward.ensemble import EnsembleScorer
from steersman.reward.function_scorer import FunctionScorer
from steersman.reward.handler import RewardHandler
from steersman.reward.model_manager import ModelManager
from steersman.reward.model_scorer import ModelScorer
from steersman.reward.plugin import load_function
from steersman.reward.roster import Roster
from steersman.reward.served_model import ServedModel
from steersman.reward.settings import (
    EnsembleSettings,
    FunctionScorerSettings,
    ModelScorerSettings,
    RewardSettings,
)
from steersman.reward.text import Encoding, TextEncoder
from steersman.serving.batch_metrics import BatchMetrics
from steersman.serving.location import locate
from steersman.serving.metrics import Metrics
from steersman.serving.models import load_tokenizer, use_threads

T = TypeVar("T")


async def build_handler(settings: RewardSettings, metrics: Metrics) -> tuple[RewardHandler, ModelManager]:
    """Loads all models and functions and warms them up. `ValueError` names the setting that is wrong."""
    use_threads(settings.num_threads)
    roster, builder = Roster(), TorchModelBuilder(metrics, settings.stall_seconds)
    named = settings.named_scorers()
    for name, scorer in named.items():
        field = f"scorers.{name}"
        if isinstance(scorer, FunctionScorerSettings):
            roster.fixed[name] = build_function_scorer(field, name, scorer)
        elif isinstance(scorer, EnsembleSettings):
            roster.fixed[name] = EnsembleScorer(name, roster, scorer)
        else:
            model = ServedModel(name, scorer, await builder.build_at_start(field, name, scorer))
            roster.models[name] = model
            roster.point(name, model)
    handler = RewardHandler(roster, settings.default_scorer or next(iter(named)), watched=roster.in_service)
    return handler, ModelManager(roster, builder, settings.models, metrics)


class TorchModelBuilder:
    """A `ModelBuilder` on torch."""

    def __init__(self, metrics: Metrics, stall_seconds: float) -> None:
        self._batch_metrics = BatchMetrics(metrics)
        self._cache_metrics = CacheMetrics(metrics)
        self._stall_seconds = stall_seconds

    async def build_at_start(self, field: str, name: str, settings: ModelScorerSettings) -> ModelScorer:
        """A warm model, loaded at once. One that gives NaN is served, and its items fail."""
        scorer = self._scorer(name, settings, Parts.load(field, settings))
        await scorer.warm_up()
        return scorer

    async def build(self, name: str, settings: ModelScorerSettings, *, reserve: float) -> ModelScorer:
        """See `ModelBuilder.build`. A model that gives NaN is refused: another one serves."""
        field = f"models.{name}"

        def load() -> Parts:
            check_memory(field, settings, reserve)
            return Parts.load(field, settings)

        scorer = self._scorer(name, settings, await on_daemon_thread(load, Parts.close, f"load-{name}"))
        try:
            if not await scorer.warm_up():
                raise ValueError(f"{field}.model: gives scores that are not finite, allowed: a model that does not")
        except BaseException:
            await scorer.close()
            raise
        return scorer

    def release(self, name: str) -> None:
        """See `ModelBuilder.release`."""
        self._batch_metrics.forget(name)
        self._cache_metrics.forget(name)
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        # glibc keeps what was freed in small pieces; other C libraries have no such call.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    def _scorer(self, name: str, settings: ModelScorerSettings, parts: "Parts") -> ModelScorer:
        engine = parts.engine
        cached = settings.cache_items > 0
        return ModelScorer(
            name,
            engine,
            settings.batching.for_device(engine.device_type, engine.num_workers),
            encoder=parts.encoder,
            bos_token_id=parts.bos_token_id,
            stall_seconds=self._stall_seconds,
            observer=self._batch_metrics.observer(name),
            normalization=parts.normalization,
            length_penalty=settings.length_penalty,
            cache=ScoreCache(settings.cache_items, self._cache_metrics.observer(name)) if cached else None,
            tokenizer_digest=parts.tokenizer_digest,
            parameter_bytes=engine.parameter_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What is read from a checkpoint. Loading it blocks, on whatever thread it is called."""

    engine: LoadedEngine
    normalization: Normalization
    encoder: TextEncoder | None = None
    bos_token_id: int | None = None
    tokenizer_digest: str = ""

    @classmethod
    def load(cls, field: str, settings: ModelScorerSettings) -> "Parts":
        """Reads model, tokenizer and normalisation. `ValueError` names the setting below `field` that is wrong."""
        # The engine comes last: what is wrong with the rest is said before minutes of loading.
        folder = locate(f"{field}.model", settings.model, settings.revision).folder
        normalized = settings.normalize == "auto"
        stored = stored_normalization(f"{field}.model", folder) if normalized else None
        tokenizer = load_tokenizer(settings.model, settings.revision)
        engine = load_engine(field, settings)
        parts = cls(engine=engine, normalization=(stored or engine.normalization) if normalized else Normalization())
        if tokenizer is None:
            return parts
        try:
            encoder = TextEncoder(tokenizer, choose_encoding(settings, engine.encoding))
        except ValueError as error:
            parts.close()
            raise ValueError(f"{field}.{error}") from None
        return replace(
            parts,
            encoder=encoder,
            bos_token_id=tokenizer.bos_token_id,
            tokenizer_digest=digest_tokenizer(tokenizer),
        )

    def close(self) -> None:
        """Frees the model. Blocks."""
        self.engine.close()


def load_engine(field: str, settings: ModelScorerSettings) -> LoadedEngine:
    """The model on its backend. `ValueError` names the setting below `field` that is wrong."""
    if settings.backend == "torch":
        return TorchScoreEngine.load(field, settings)
    try:
        # Only here: vLLM is not installed everywhere, and takes seconds to import.
        from steersman.reward.engine.vllm_engine import VllmScoreEngine
    except ImportError as error:
        raise ValueError(f"{field}.backend: is 'vllm', which cannot be imported ({error}), allowed: torch") from error
    return VllmScoreEngine.load(field, settings)


def digest_tokenizer(tokenizer: Any) -> str:
    """SHA-256 over the vocabulary: two tokenizers with the same digest mean the same by an id."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


async def on_daemon_thread(work: Callable[[], T], discard: Callable[[T], None], name: str) -> T:
    """What `work` returns or raises, on a thread that keeps no process alive.

    It cannot be ended from outside: if nobody waits any more when it returns, `discard` gets the result, on a thread.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def start(target: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=target, args=arguments, name=name, daemon=True).start()

    def finish(result: T) -> None:
        if done.done():
            start(discard, result)
        else:
            done.set_result(result)

    def fail(error: BaseException) -> None:
        if not done.done():
            done.set_exception(error)

    def run() -> None:
        # A closed loop has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            try:
                result = work()
            except BaseException as error:
                loop.call_soon_threadsafe(fail, error)
            else:
                loop.call_soon_threadsafe(finish, result)

    start(run)
    try:
        return await done
    except asyncio.CancelledError:
        if done.done() and not done.cancelled() and done.exception() is None:
            start(discard, done.result())
        raise


def build_function_scorer(field: str, name: str, settings: FunctionScorerSettings) -> FunctionScorer:
    """One function."""
    function = load_function(f"{field}.function", settings.function)
    decoder = None
    if settings.tokenizer is not None:
        tokenizer = load_tokenizer(settings.tokenizer)
        if tokenizer is None:
            raise ValueError(f"{field}.tokenizer: is {settings.tokenizer!r}, allowed: a folder or hub id with one")
        decoder = TextEncoder(tokenizer, "template")
    return FunctionScorer(name, function, settings, decoder=decoder)


def choose_encoding(settings: ModelScorerSettings, of_model: str | None) -> Encoding:
    """What the settings say, else what the model's configuration says, else template."""
    wanted = of_model or "template" if settings.encoding == "auto" else settings.encoding
    if wanted == "template":
        return "template"
    if wanted == "continuation":
        return "continuation"
    raise ValueError(f"model: its reward_encoding is {wanted!r}, allowed: template, continuation")
