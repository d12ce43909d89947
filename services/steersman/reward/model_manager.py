"""Loads, switches and unloads models while the server serves.

Invariants:

- what a scorer points to is always ready: it changes by `switch` alone, in one assignment on the event loop, and a load
  that fails changes nothing;
- a model is closed only when nothing points to it, and after its last item (or `drain_seconds`);
- at most `max_models` are held, and one is loaded at a time: a load needs memory that the next one must see is gone.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final, Protocol

from steersman.reward.model_scorer import ModelScorer
from steersman.reward.model_sources import check_source
from steersman.reward.roster import Roster
from steersman.reward.served_model import ModelState, ModelStatus, ServedModel
from steersman.reward.settings import LiveModelsSettings, ModelScorerSettings
from steersman.serving.metrics import Metrics
from steersman.wire.errors import Reason, SteersmanError, invalid_field, not_found

logger = logging.getLogger(__name__)

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# Models that could not be loaded and that nobody has forgotten; the oldest go.
_MAX_FAILED: Final = 16


class ModelBuilder(Protocol):
    """Makes models out of settings; `steersman.reward.build` has it on torch."""

    async def build(self, name: str, settings: ModelScorerSettings, *, reserve: float) -> ModelScorer:
        """A warm model, not loaded on the event loop. `ValueError` says what is wrong with it, memory included."""
        ...

    def release(self, name: str) -> None:
        """Gives memory of models that are gone back to the system. Blocks."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """What to load, and what to do with it then. An empty `scorer` is none, an empty `revision` is the newest."""

    name: str
    source: str
    revision: str = ""
    scorer: str = ""
    switch_when_ready: bool = False
    unload_previous: bool = False
    allow_other_tokenizer: bool = False


class ModelManager:
    """The models of a roster. Used on the event loop."""

    def __init__(
        self, roster: Roster, builder: ModelBuilder, settings: LiveModelsSettings, metrics: Metrics | None = None
    ) -> None:
        self._roster = roster
        self._builder = builder
        self._settings = settings
        self._loading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._unloads: dict[str, asyncio.Task[None]] = {}
        metrics = metrics or Metrics("reward")
        self._loads = metrics.counter("model_loads", "Models loaded by request, by outcome.", ("outcome",))
        self._switches = metrics.counter("scorer_switches", "Switches of a scorer to another model.", ("scorer",))

    def status(self, name: str) -> ModelStatus:
        """What a model does now. Raises NOT_FOUND."""
        model = self._find(name)
        return model.status(self._roster.pointing_to(model))

    def statuses(self) -> list[ModelStatus]:
        """All models, ascending by name."""
        return [self.status(name) for name in sorted(self._roster.models)]

    async def wait(self, name: str, timeout_s: float) -> ModelStatus:
        """What a model does when it is neither loading nor unloading, or after `timeout_s`. NOT_FOUND if it is gone."""
        model = self._find(name)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await model.settled()
        return self.status(name)

    def load(self, request: LoadRequest) -> ModelStatus:
        """Begins to load. Raises PERMISSION_DENIED, INVALID_FIELD, NOT_FOUND, ALREADY_EXISTS, MODEL_STATE."""
        models = self._roster.models
        if not _NAME.fullmatch(request.name):
            raise invalid_field("name", request.name, "1 to 64 letters, digits, dots, dashes and underscores")
        source = check_source(request.source, request.revision, self._settings)
        base = self._pointed(request.scorer).settings if request.scorer else None
        if request.switch_when_ready and not request.scorer:
            raise invalid_field("scorer", "", "the name of the scorer to switch")
        existing = models.get(request.name)
        if request.name in self._roster or (existing is not None and existing.state is not ModelState.FAILED):
            raise SteersmanError(Reason.ALREADY_EXISTS, f"a model or scorer is called {request.name!r}")
        held = [name for name, model in models.items() if model.state is not ModelState.FAILED]
        if len(held) >= self._settings.max_models:
            message = f"{len(held)} models are held ({', '.join(sorted(held))}), allowed: {self._settings.max_models}"
            raise SteersmanError(Reason.MODEL_STATE, f"{message}; unload one first")
        changes = {"model": source, "revision": request.revision or None}
        settings = base.model_copy(update=changes) if base is not None else ModelScorerSettings.model_validate(changes)
        model = models[request.name] = ServedModel(request.name, settings)
        self._start(self._load(model, request))
        return self.status(request.name)

    def switch(self, scorer: str, name: str, *, allow_other_tokenizer: bool = False) -> tuple[ModelStatus, str]:
        """Points a scorer to a model; what it is now, and the name of the one before.

        Raises NOT_FOUND, INVALID_FIELD for a scorer that is no model, MODEL_STATE.
        """
        model, before = self._find(name), self._pointed(scorer)
        if model.state is not ModelState.READY:
            raise SteersmanError(Reason.MODEL_STATE, f"model {name} is {model.state}, allowed: ready")
        if not allow_other_tokenizer and _reads_otherwise(before.scorer, model.scorer):
            message = f"model {name} has another tokenizer than {before.name}, to which token ids mean something else"
            raise SteersmanError(Reason.MODEL_STATE, f"{message}; allowed with allow_other_tokenizer")
        self._roster.point(scorer, model)
        if model is not before:
            self._switches.labels(scorer).inc()
            logger.info("scorer switched", extra={"scorer": scorer, "model": name, "previous": before.name})
        return self.status(name), before.name

    async def unload(self, name: str) -> ModelStatus:
        """Returns when the memory of the model is free. Raises NOT_FOUND, MODEL_STATE."""
        model = self._find(name)
        pointing = self._roster.pointing_to(model)
        if pointing:
            message = f"scorer {', '.join(pointing)} points to model {name}; switch it to another one first"
            raise SteersmanError(Reason.MODEL_STATE, message)
        if model.state is ModelState.LOADING:
            raise SteersmanError(Reason.MODEL_STATE, f"model {name} is loading, allowed: ready or failed")
        await asyncio.shield(self._begin_unload(model))
        return model.status(())

    async def close(self) -> None:
        """Ends loads, and frees all models."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(model.close() for model in self._roster.models.values()))

    async def _load(self, model: ServedModel, request: LoadRequest) -> None:
        async with self._loading:
            scorer = await self._build(model)
            if scorer is None:
                await asyncio.to_thread(self._builder.release, model.name)
                return
        logger.info("model loaded", extra={"model": model.name, "source": model.settings.model})
        self._loads.labels("ready").inc()
        # Nothing is awaited from here on: who waits for READY finds the switch made as well.
        model.enter(ModelState.READY, scorer=scorer)
        if request.switch_when_ready:
            self._switch_when_ready(model, request)

    async def _build(self, model: ServedModel) -> ModelScorer | None:
        """A warm model; None if it failed, which its state tells then."""
        try:
            async with asyncio.timeout(self._settings.load_seconds):
                return await self._builder.build(model.name, model.settings, reserve=self._settings.memory_reserve)
        except Exception as error:
            logger.warning("model not loaded", extra={"model": model.name}, exc_info=error)
            self._loads.labels("failed").inc()
            model.enter(ModelState.FAILED, error=self._explain(error))
            self._forget_failures()
            return None

    def _switch_when_ready(self, model: ServedModel, request: LoadRequest) -> None:
        before = self._roster.pointed(request.scorer)
        try:
            self.switch(request.scorer, model.name, allow_other_tokenizer=request.allow_other_tokenizer)
        except SteersmanError as error:
            model.error = f"scorer {request.scorer} was not switched to it: {error.message}"
            logger.warning("scorer not switched", extra={"scorer": request.scorer, "model": model.name}, exc_info=error)
            return
        if request.unload_previous and before is not None and not self._roster.pointing_to(before):
            self._begin_unload(before)

    def _begin_unload(self, model: ServedModel) -> "asyncio.Task[None]":
        if model.name not in self._unloads:
            self._unloads[model.name] = self._start(self._unload(model))
            if model.state is ModelState.READY:
                model.enter(ModelState.UNLOADING)
        return self._unloads[model.name]

    async def _unload(self, model: ServedModel) -> None:
        try:
            await model.drain(self._settings.drain_seconds)
            await model.close()
            # The name is free only when nothing of the old model can be taken for the next one of that name.
            await asyncio.to_thread(self._builder.release, model.name)
            del self._roster.models[model.name]
            logger.info("model unloaded", extra={"model": model.name})
        finally:
            model.gone()
            del self._unloads[model.name]

    def _forget_failures(self) -> None:
        models = self._roster.models
        failed = [name for name, model in models.items() if model.state is ModelState.FAILED]
        for name in failed[:-_MAX_FAILED]:
            del models[name]

    def _find(self, name: str) -> ServedModel:
        model = self._roster.models.get(name)
        if model is None:
            raise not_found("model", name, list(self._roster.models))
        return model

    def _pointed(self, scorer: str) -> ServedModel:
        model = self._roster.pointed(scorer)
        if model is None and scorer in self._roster.fixed:
            raise invalid_field("scorer", scorer, "a scorer that points to a model, not a function or an ensemble")
        if model is None:
            raise not_found("scorer that points to a model", scorer)
        return model

    def _start(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _explain(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"it was not loaded within {self._settings.load_seconds:g} s"
        if isinstance(error, ValueError | SteersmanError):
            return str(error)
        # What libraries say may hold paths and more: the log has it.
        return f"loading failed with {type(error).__name__}; the server's log says why"


def _reads_otherwise(before: ModelScorer, after: ModelScorer) -> bool:
    """Whether token ids for one may mean something else to the other."""
    if before.tokenizer_digest and after.tokenizer_digest:
        return before.tokenizer_digest != after.tokenizer_digest
    return before.model.vocab_size != after.model.vocab_size
