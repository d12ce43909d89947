"""Clients of the service that loads, switches and unloads the models of a reward server.

    >>> with RewardModelClient("127.0.0.1:50053") as models:
    ...     models.load("helpful-2", "runs/reward-2/model", scorer="helpful", switch=True, unload_previous=True)

A server answers for itself alone: where several serve, ask each by its own address.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from google.protobuf.duration_pb2 import Duration

from steersman.client.calls import AsyncClient, Client, Deadline
from steersman.v1 import reward_model_pb2, reward_model_pb2_grpc
from steersman.wire.convert import model_from_proto
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.identity import ModelInfo

# One question waits at the server for so long; a connection that is silent for longer may be cut by what lies between.
_WAIT_SECONDS: Final = 20.0
# With less than that left no question is asked any more.
_LAST_SECONDS: Final = 0.01


class RewardModelState(StrEnum):
    """What a model is doing. UNKNOWN: something that this client is too old for."""

    UNKNOWN = "unknown"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    UNLOADING = "unloading"


_STATE: Final = {
    reward_model_pb2.REWARD_MODEL_STATE_LOADING: RewardModelState.LOADING,
    reward_model_pb2.REWARD_MODEL_STATE_READY: RewardModelState.READY,
    reward_model_pb2.REWARD_MODEL_STATE_FAILED: RewardModelState.FAILED,
    reward_model_pb2.REWARD_MODEL_STATE_UNLOADING: RewardModelState.UNLOADING,
}


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A model that a reward server holds.

    Attributes:
        name: its name, by which it can be asked for as a scorer.
        source: a folder of the server, or a hub id.
        state: what it does; since `state_time`.
        error: why it could not be loaded, or scorers not switched to it; empty if nothing went wrong.
        model: revision and limits, once it was read.
        scorers: names of the scorers that point to it.
        parameter_bytes: of its parameters; 0 before it is ready.
        num_items_in_flight: items accepted and not answered yet.
    """

    name: str
    source: str
    state: RewardModelState
    error: str
    model: ModelInfo | None
    scorers: tuple[str, ...]
    parameter_bytes: int
    num_items_in_flight: int
    state_time: datetime


@dataclass(frozen=True, kw_only=True)
class ScorerSwitch:
    """The model that a scorer points to now, and the name of the one before."""

    model: RewardModel
    previous: str


def reward_model_from_proto(message: reward_model_pb2.RewardModel) -> RewardModel:
    """One model."""
    return RewardModel(
        name=message.name,
        source=message.source,
        state=_STATE.get(message.state, RewardModelState.UNKNOWN),
        error=message.error,
        model=model_from_proto(message.model) if message.HasField("model") else None,
        scorers=tuple(message.scorers),
        parameter_bytes=message.parameter_bytes,
        num_items_in_flight=message.num_items_in_flight,
        state_time=message.state_time.ToDatetime(),
    )


def load_request(
    name: str,
    source: str,
    *,
    revision: str,
    scorer: str,
    switch: bool,
    unload_previous: bool,
    allow_other_tokenizer: bool,
) -> reward_model_pb2.LoadModelRequest:
    """The request for a load."""
    return reward_model_pb2.LoadModelRequest(
        name=name,
        source=source,
        revision=revision,
        scorer=scorer,
        switch_when_ready=switch,
        unload_previous=unload_previous,
        allow_other_tokenizer=allow_other_tokenizer,
    )


def wait_request(name: str, deadline: Deadline) -> reward_model_pb2.GetModelRequest:
    """The question that is answered when a model has settled, or after a while. Raises DEADLINE_EXCEEDED at the end."""
    left = deadline.remaining()
    if left <= _LAST_SECONDS:
        message = f"model {name} is still loading after {deadline.seconds:g} s; the server goes on with it"
        raise SteersmanError(Reason.DEADLINE_EXCEEDED, message)
    wait = Duration()
    # The answer needs some of the time that is left.
    wait.FromMilliseconds(round(1000 * min(_WAIT_SECONDS, left / 2)))
    return reward_model_pb2.GetModelRequest(name=name, wait=wait)


def require_ready(model: RewardModel, *, switch: bool) -> RewardModel:
    """The model if it was loaded, and switched to where that was asked for. Raises MODEL_STATE."""
    if model.state is not RewardModelState.READY:
        raise SteersmanError(Reason.MODEL_STATE, f"model {model.name} is {model.state}: {model.error}")
    if switch and model.error:
        raise SteersmanError(Reason.MODEL_STATE, f"model {model.name} is ready, but {model.error}")
    return model


class AsyncRewardModelClient(AsyncClient):
    """Asyncio client. Loads and unloads have 30 minutes, other calls 30 s, unless `timeout` says otherwise."""

    default_timeout = 1800.0
    _stub_type = reward_model_pb2_grpc.RewardModelServiceStub

    async def load(
        self,
        name: str,
        source: str,
        *,
        revision: str = "",
        scorer: str = "",
        switch: bool = False,
        unload_previous: bool = False,
        allow_other_tokenizer: bool = False,
        wait: bool = True,
        timeout: float | None = None,
    ) -> RewardModel:
        """Has a model loaded while the others serve on, and returns it when it is ready.

        Raises SteersmanError: PERMISSION_DENIED for a source that the server's settings do not allow, MODEL_STATE if it
        cannot be loaded or not be switched to, ALREADY_EXISTS for a name that is taken. What served before serves on
        then. A load that outlasts `timeout` is DEADLINE_EXCEEDED here, and goes on at the server.

        Args:
            name: for the model; it can be asked for as a scorer by it.
            source: a folder below one of the server's model roots, or a hub id that it allows, at `revision`.
            scorer: what the model is meant for: it takes the settings of the model that this scorer points to.
            switch: point that scorer to it as soon as it is ready; `unload_previous`: and unload the one before.
            allow_other_tokenizer: even if token ids mean something else to it.
            wait: False returns at once, while it is loading.
        """
        request = load_request(
            name,
            source,
            revision=revision,
            scorer=scorer,
            switch=switch,
            unload_previous=unload_previous,
            allow_other_tokenizer=allow_other_tokenizer,
        )
        deadline = self._deadline(timeout)
        model = reward_model_from_proto((await self._call(self._stub.LoadModel, request, deadline)).model)
        while wait and model.state is RewardModelState.LOADING:
            model = reward_model_from_proto(
                (await self._call(self._stub.GetModel, wait_request(name, deadline), deadline)).model
            )
        return require_ready(model, switch=switch) if wait else model

    async def get(self, name: str, *, timeout: float | None = 30.0) -> RewardModel:
        """One model as it is now. Raises NOT_FOUND."""
        request = reward_model_pb2.GetModelRequest(name=name)
        return reward_model_from_proto((await self._call(self._stub.GetModel, request, timeout)).model)

    async def list(self, *, timeout: float | None = 30.0) -> list[RewardModel]:
        """All models, ascending by name."""
        response = await self._call(self._stub.ListModels, reward_model_pb2.ListModelsRequest(), timeout)
        return [reward_model_from_proto(model) for model in response.models]

    async def switch(
        self, scorer: str, model: str, *, allow_other_tokenizer: bool = False, timeout: float | None = 30.0
    ) -> ScorerSwitch:
        """Points a scorer to a loaded model. Raises NOT_FOUND, MODEL_STATE, INVALID_FIELD."""
        request = reward_model_pb2.SwitchScorerRequest(
            scorer=scorer, model=model, allow_other_tokenizer=allow_other_tokenizer
        )
        response = await self._call(self._stub.SwitchScorer, request, timeout)
        return ScorerSwitch(model=reward_model_from_proto(response.model), previous=response.previous)

    async def unload(self, name: str, *, timeout: float | None = None) -> None:
        """Returns when the model has answered its last item and its memory is free. Raises NOT_FOUND, MODEL_STATE."""
        await self._call(self._stub.UnloadModel, reward_model_pb2.UnloadModelRequest(name=name), timeout)


class RewardModelClient(Client):
    """Blocking client; as `AsyncRewardModelClient`."""

    default_timeout = 1800.0
    _stub_type = reward_model_pb2_grpc.RewardModelServiceStub

    def load(
        self,
        name: str,
        source: str,
        *,
        revision: str = "",
        scorer: str = "",
        switch: bool = False,
        unload_previous: bool = False,
        allow_other_tokenizer: bool = False,
        wait: bool = True,
        timeout: float | None = None,
    ) -> RewardModel:
        """Has a model loaded while the others serve on; as `AsyncRewardModelClient.load`."""
        request = load_request(
            name,
            source,
            revision=revision,
            scorer=scorer,
            switch=switch,
            unload_previous=unload_previous,
            allow_other_tokenizer=allow_other_tokenizer,
        )
        deadline = self._deadline(timeout)
        model = reward_model_from_proto(self._call(self._stub.LoadModel, request, deadline).model)
        while wait and model.state is RewardModelState.LOADING:
            model = reward_model_from_proto(
                self._call(self._stub.GetModel, wait_request(name, deadline), deadline).model
            )
        return require_ready(model, switch=switch) if wait else model

    def get(self, name: str, *, timeout: float | None = 30.0) -> RewardModel:
        """One model as it is now. Raises NOT_FOUND."""
        request = reward_model_pb2.GetModelRequest(name=name)
        return reward_model_from_proto(self._call(self._stub.GetModel, request, timeout).model)

    def list(self, *, timeout: float | None = 30.0) -> list[RewardModel]:
        """All models, ascending by name."""
        response = self._call(self._stub.ListModels, reward_model_pb2.ListModelsRequest(), timeout)
        return [reward_model_from_proto(model) for model in response.models]

    def switch(
        self, scorer: str, model: str, *, allow_other_tokenizer: bool = False, timeout: float | None = 30.0
    ) -> ScorerSwitch:
        """Points a scorer to a loaded model. Raises NOT_FOUND, MODEL_STATE, INVALID_FIELD."""
        request = reward_model_pb2.SwitchScorerRequest(
            scorer=scorer, model=model, allow_other_tokenizer=allow_other_tokenizer
        )
        response = self._call(self._stub.SwitchScorer, request, timeout)
        return ScorerSwitch(model=reward_model_from_proto(response.model), previous=response.previous)

    def unload(self, name: str, *, timeout: float | None = None) -> None:
        """Returns when the model has answered its last item and its memory is free. Raises NOT_FOUND, MODEL_STATE."""
        self._call(self._stub.UnloadModel, reward_model_pb2.UnloadModelRequest(name=name), timeout)
