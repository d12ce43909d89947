"""The first token, before anybody asks for one."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from policy_fakes import FakeEngine

from steersman.policy import app
from steersman.policy.app import warm_up
from steersman.policy.engine.port import EngineDeadError, GenerationRequest, SampleDelta
from steersman.wire.errors import Reason, SteersmanError


class DyingEngine(FakeEngine):
    """Says that it is well, and dies of its first token: vLLM with a head size that it has no kernel for."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[SampleDelta, None]:
        self.dead = True
        raise EngineDeadError("fake")
        yield


class StuckEngine(FakeEngine):
    """Never draws a token."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[SampleDelta, None]:
        await asyncio.Event().wait()
        yield self._delta(request, 0, 0, 1)


async def test_one_token_is_drawn() -> None:
    engine = FakeEngine()
    await warm_up(engine)
    (request,) = engine.requests
    assert (request.max_tokens, request.num_samples) == (1, 1)
    assert engine.events == ["finished"]


async def test_a_model_that_loads_but_does_not_run_is_said_at_start() -> None:
    engine = DyingEngine()
    engine.check_health()
    with pytest.raises(SteersmanError, match="died of its first token") as caught:
        await warm_up(engine)
    assert caught.value.reason is Reason.ENGINE_UNAVAILABLE


async def test_a_first_token_that_never_comes_is_said_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_WARM_UP_S", 0.01)
    with pytest.raises(SteersmanError, match=r"first token took over 0\.01 s"):
        await warm_up(StuckEngine())
