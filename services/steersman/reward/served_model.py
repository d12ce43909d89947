"""A loaded model by its name: what it does, and the items it owes answers for."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from steersman.reward.model_scorer import ModelScorer
from steersman.reward.settings import ModelScorerSettings
from steersman.reward.types import Score, ScoreItem, ScoreOptions, ScorerKind
from steersman.wire.errors import unavailable
from steersman.wire.identity import ModelInfo


class ModelState(StrEnum):
    """What a model is doing. LOADING ends READY or FAILED; UNLOADING ends with the model."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    UNLOADING = "unloading"


@dataclass(frozen=True, kw_only=True)
class ModelStatus:
    """A model for people to see. `scorers` are the names that lead to it, `model` is None before it was read."""

    name: str
    settings: ModelScorerSettings
    state: ModelState
    state_time: datetime
    error: str
    model: ModelInfo | None
    scorers: tuple[str, ...]
    parameter_bytes: int
    num_items_in_flight: int


class ServedModel:
    """A `Scorer` while it is ready, that counts the items it has, so that it can be unloaded after the last one."""

    kind = ScorerKind.MODEL

    def __init__(self, name: str, settings: ModelScorerSettings, scorer: ModelScorer | None = None) -> None:
        """With a `scorer` it is ready, else it is loading."""
        self.name = name
        self.settings = settings
        self.error = ""
        self._scorer = scorer
        self._model = scorer.model if scorer is not None else None
        self._state = ModelState.LOADING if scorer is None else ModelState.READY
        self._state_time = datetime.now(UTC)
        self._num_in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._settled = asyncio.Event()
        if scorer is not None:
            self._settled.set()

    @property
    def state(self) -> ModelState:
        """What it does."""
        return self._state

    @property
    def model(self) -> ModelInfo | None:
        """See `Scorer.model`; known to the end once it was read."""
        return self._model

    @property
    def scorer(self) -> ModelScorer:
        """What scores; only while it is READY or UNLOADING."""
        if self._scorer is None:
            raise unavailable(f"model {self.name} is {self._state}")
        return self._scorer

    def enter(self, state: ModelState, *, scorer: ModelScorer | None = None, error: str = "") -> None:
        """Changes the state, and wakes those who wait for it to be settled."""
        self._state, self._state_time, self.error = state, datetime.now(UTC), error
        if scorer is not None:
            self._scorer, self._model = scorer, scorer.model
        if state in (ModelState.LOADING, ModelState.UNLOADING):
            self._settled.clear()
        else:
            self._settled.set()

    async def settled(self) -> None:
        """Returns when it is neither loading nor unloading: ready, failed, or gone."""
        await self._settled.wait()

    async def submit(self, items: Sequence[ScoreItem], options: ScoreOptions) -> "list[asyncio.Future[Score]]":
        """See `Scorer.submit`. The items count from before the first wait on."""
        scorer = self.scorer
        self._owe(len(items))
        try:
            futures = await scorer.submit(items, options)
        except BaseException:
            self._owe(-len(items))
            raise
        for future in futures:
            future.add_done_callback(self._answered)
        return futures

    async def check_health(self) -> None:
        """See `Scorer.check_health`."""
        if self._scorer is not None:
            await self._scorer.check_health()

    async def drain(self, timeout_s: float) -> None:
        """Returns when it owes nothing, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return

    async def close(self) -> None:
        """See `Scorer.close`. It keeps no hold on what it loaded."""
        scorer, self._scorer = self._scorer, None
        if scorer is not None:
            await scorer.close()

    def gone(self) -> None:
        """It is unloaded; wakes those who wait for that."""
        self._settled.set()

    def status(self, scorers: Sequence[str]) -> ModelStatus:
        """What it is now, given the names that lead to it."""
        return ModelStatus(
            name=self.name,
            settings=self.settings,
            state=self._state,
            state_time=self._state_time,
            error=self.error,
            model=self._model,
            scorers=tuple(sorted(scorers)),
            parameter_bytes=self._scorer.parameter_bytes if self._scorer is not None else 0,
            num_items_in_flight=self._num_in_flight,
        )

    def _owe(self, num_items: int) -> None:
        self._num_in_flight += num_items
        if self._num_in_flight:
            self._idle.clear()
        else:
            self._idle.set()

    def _answered(self, _: object) -> None:
        self._owe(-1)
