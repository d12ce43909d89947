"""The reward service on the wire: messages to plain values and back (in `convert`)."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import grpc

from steersman.reward import convert, open_inference, tei
from steersman.reward.compat import open_inference_pb2_grpc, tei_pb2_grpc
from steersman.reward.handler import RewardHandler
from steersman.reward.http.server import HttpServer
from steersman.reward.model_manager import ModelManager
from steersman.reward.model_servicer import RewardModelServicer
from steersman.reward.open_inference import OpenInferenceServicer
from steersman.reward.tei import TeiInfoServicer, TeiServicer
from steersman.v1 import reward_model_pb2, reward_model_pb2_grpc, reward_pb2, reward_pb2_grpc


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """Converts, calls the handler, converts."""

    def __init__(self, handler: RewardHandler) -> None:
        self._handler = handler

    async def Score(  # noqa: N802
        self, request: reward_pb2.ScoreRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> reward_pb2.ScoreResponse:
        """Scores a batch."""
        scores = await self._handler.score(*convert.request_from_proto(request))
        return reward_pb2.ScoreResponse(results=convert.scores_to_proto(scores))

    async def StreamScore(  # noqa: N802
        self,
        request_iterator: AsyncIterator[reward_pb2.StreamScoreRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[reward_pb2.StreamScoreResponse]:
        """Scores items as they come."""
        async with aclosing(self._handler.stream(convert.parts_from_proto(request_iterator))) as stream:
            async for scores in stream:
                yield reward_pb2.StreamScoreResponse(results=convert.scores_to_proto(scores))

    async def ListScorers(  # noqa: N802
        self, request: reward_pb2.ListScorersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> reward_pb2.ListScorersResponse:
        """Lists the scorers."""
        return convert.scorers_to_proto(self._handler.scorers())


class RewardService:
    """The reward service as `serving` runs it."""

    name = "reward"

    def __init__(
        self, handler: RewardHandler, manager: ModelManager | None = None, http: HttpServer | None = None
    ) -> None:
        """Without a `manager` the models are those that it starts with, and RewardModelService is not there.

        `http` is a running front, which ends with the service.
        """
        self._handler = handler
        self._manager = manager
        self._http = http

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """See `Service.register`."""
        reward_pb2_grpc.add_RewardServiceServicer_to_server(RewardServicer(self._handler), server)
        names = [reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name]
        if self._manager is not None:
            servicer = RewardModelServicer(self._manager)
            reward_model_pb2_grpc.add_RewardModelServiceServicer_to_server(servicer, server)
            names.append(reward_model_pb2.DESCRIPTOR.services_by_name["RewardModelService"].full_name)
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(OpenInferenceServicer(self._handler), server)
        tei_pb2_grpc.add_PredictServicer_to_server(TeiServicer(self._handler), server)
        tei_pb2_grpc.add_InfoServicer_to_server(TeiInfoServicer(self._handler), server)
        return [*names, open_inference.SERVICE, *tei.SERVICES]

    async def check_health(self) -> None:
        """See `Service.check_health`."""
        await self._handler.check_health()

    async def drain(self) -> None:
        """The HTTP front takes no more calls; those in flight, on either, are answered from the queue."""
        if self._http is not None:
            await self._http.stop()

    async def close(self) -> None:
        """See `Service.close`."""
        if self._manager is not None:
            await self._manager.close()
        await self._handler.close()
