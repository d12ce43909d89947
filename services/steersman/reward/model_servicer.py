"""RewardModelService on the wire: converts, calls the manager, converts."""

from typing import Any, Final

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from steersman.reward.model_manager import LoadRequest, ModelManager
from steersman.reward.served_model import ModelState, ModelStatus
from steersman.v1 import reward_model_pb2, reward_model_pb2_grpc
from steersman.wire.convert import model_to_proto
from steersman.wire.errors import invalid_field

Context = grpc.aio.ServicerContext[Any, Any]

# A call that waits holds a connection: whoever waits longer asks again.
_MAX_WAIT_S: Final = 3600.0

_STATE: Final = {
    ModelState.LOADING: reward_model_pb2.REWARD_MODEL_STATE_LOADING,
    ModelState.READY: reward_model_pb2.REWARD_MODEL_STATE_READY,
    ModelState.FAILED: reward_model_pb2.REWARD_MODEL_STATE_FAILED,
    ModelState.UNLOADING: reward_model_pb2.REWARD_MODEL_STATE_UNLOADING,
}


class RewardModelServicer(reward_model_pb2_grpc.RewardModelServiceServicer):
    """The models of one server."""

    def __init__(self, manager: ModelManager) -> None:
        self._manager = manager

    async def LoadModel(  # noqa: N802
        self, request: reward_model_pb2.LoadModelRequest, context: Context
    ) -> reward_model_pb2.LoadModelResponse:
        """Begins to load."""
        status = self._manager.load(
            LoadRequest(
                name=request.name,
                source=request.source,
                revision=request.revision,
                scorer=request.scorer,
                switch_when_ready=request.switch_when_ready,
                unload_previous=request.unload_previous,
                allow_other_tokenizer=request.allow_other_tokenizer,
            )
        )
        return reward_model_pb2.LoadModelResponse(model=_to_proto(status))

    async def GetModel(  # noqa: N802
        self, request: reward_model_pb2.GetModelRequest, context: Context
    ) -> reward_model_pb2.GetModelResponse:
        """Tells of one model, at once or when it has settled."""
        if request.HasField("wait"):
            status = await self._manager.wait(request.name, _seconds(request.wait))
        else:
            status = self._manager.status(request.name)
        return reward_model_pb2.GetModelResponse(model=_to_proto(status))

    async def ListModels(  # noqa: N802
        self, request: reward_model_pb2.ListModelsRequest, context: Context
    ) -> reward_model_pb2.ListModelsResponse:
        """Lists the models."""
        return reward_model_pb2.ListModelsResponse(models=map(_to_proto, self._manager.statuses()))

    async def SwitchScorer(  # noqa: N802
        self, request: reward_model_pb2.SwitchScorerRequest, context: Context
    ) -> reward_model_pb2.SwitchScorerResponse:
        """Points a scorer to a model."""
        status, previous = self._manager.switch(
            request.scorer, request.model, allow_other_tokenizer=request.allow_other_tokenizer
        )
        return reward_model_pb2.SwitchScorerResponse(model=_to_proto(status), previous=previous)

    async def UnloadModel(  # noqa: N802
        self, request: reward_model_pb2.UnloadModelRequest, context: Context
    ) -> reward_model_pb2.UnloadModelResponse:
        """Unloads, and answers when the memory is free."""
        return reward_model_pb2.UnloadModelResponse(model=_to_proto(await self._manager.unload(request.name)))


def _to_proto(status: ModelStatus) -> reward_model_pb2.RewardModel:
    state_time = Timestamp()
    state_time.FromDatetime(status.state_time)
    return reward_model_pb2.RewardModel(
        name=status.name,
        source=status.settings.model,
        hub_revision=status.settings.revision or "",
        state=_STATE[status.state],
        error=status.error,
        model=model_to_proto(status.model) if status.model is not None else None,
        scorers=status.scorers,
        parameter_bytes=status.parameter_bytes,
        num_items_in_flight=status.num_items_in_flight,
        state_time=state_time,
    )


def _seconds(wait: Duration) -> float:
    seconds = wait.seconds + wait.nanos / 1e9
    if not 0 <= seconds <= _MAX_WAIT_S:
        raise invalid_field("wait", f"{seconds:g} s", f"0 to {_MAX_WAIT_S:g} s")
    return seconds
