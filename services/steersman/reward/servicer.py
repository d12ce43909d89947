"""The reward service on the wire: messages to plain values and back (in `convert`)."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import grpc

from steersman.reward import convert
from steersman.reward.handler import RewardHandler
from steersman.v1 import reward_pb2, reward_pb2_grpc


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

    def __init__(self, handler: RewardHandler) -> None:
        self._handler = handler

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """See `Service.register`."""
        reward_pb2_grpc.add_RewardServiceServicer_to_server(RewardServicer(self._handler), server)
        return [reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name]

    async def check_health(self) -> None:
        """See `Service.check_health`."""
        await self._handler.check_health()

    async def drain(self) -> None:
        """Nothing to hurry: calls that are in flight are answered from the queue."""

    async def close(self) -> None:
        """See `Service.close`."""
        await self._handler.close()
