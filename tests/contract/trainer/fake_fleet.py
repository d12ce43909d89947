"""Policy replicas, a reward and a reference behind real servers. They write down what they are asked, in order."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import grpc
import grpc.aio
import numpy as np
from fake_weight_service import FakeWeightService

from steersman.v1 import (
    policy_pb2,
    policy_pb2_grpc,
    reference_pb2,
    reference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
    types_pb2,
    weights_pb2_grpc,
)
from steersman.wire.convert import version_to_proto
from steersman.wire.status import status_to_proto
from steersman.wire.tensors import from_ragged, from_tensor, to_ragged

# Every sample that is drawn anywhere holds a token of its own: a doubled one is seen.
_DRAWS = count(1000)


@dataclass
class FakePolicyService(policy_pb2_grpc.PolicyServiceServicer):
    """Draws with the weights that `weights` has; while `flowing` is cleared, all samples of a prompt but the last."""

    weights: FakeWeightService
    max_sequence_tokens: int = 1024
    flowing: asyncio.Event = field(default_factory=asyncio.Event)
    num_prompts: int = 0

    async def GetModel(self, request: Any, context: Any) -> policy_pb2.PolicyServiceGetModelResponse:
        model = types_pb2.ModelInfo(name="m", max_sequence_tokens=self.max_sequence_tokens, dtype=1)
        return policy_pb2.PolicyServiceGetModelResponse(model=model)

    async def Generate(self, request: Any, context: Any) -> Any:
        self.num_prompts += 1
        self.weights.note(f"prompt at {self.weights.active}")
        for index in range(request.sampling.num_samples):
            if index == request.sampling.num_samples - 1:
                await self.flowing.wait()
            response = policy_pb2.GenerateResponse(
                sample_index=index,
                token_ids=[next(_DRAWS), 2],
                logprobs=[-1.0, -1.0],
                finish_reason=policy_pb2.FINISH_REASON_STOP,
            )
            response.weight_versions.add(version=version_to_proto(self.weights.active), start=0, end=2)
            yield response


class FakeReplica:
    """One policy replica: both of its services on one port."""

    def __init__(self, weights: FakeWeightService, **options: Any) -> None:
        self.weights = weights
        self.policy = FakePolicyService(weights=weights, **options)
        self.port = 0
        self._server: grpc.aio.Server | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """On the port that it had, if it had one."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        weights_pb2_grpc.add_WeightServiceServicer_to_server(self.weights, self._server)
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(self.policy, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def vanish(self) -> None:
        """Ends with everything under way."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None


class FakeJudges(reward_pb2_grpc.RewardServiceServicer, reference_pb2_grpc.ReferenceServiceServicer):
    """Reward (the token of its own that a sample holds) and reference (-2 everywhere) on one port."""

    def __init__(self) -> None:
        self.scored: Counter[int] = Counter()

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        results = []
        for item in request.items:
            token = item.tokens.response.ids[0]
            self.scored[token] += 1
            results.append(reward_pb2.ItemScore(id=item.id, status=status_to_proto(None), score=token, scorer="s"))
        return reward_pb2.ScoreResponse(results=results)

    async def ComputeLogprobs(self, request: Any, context: Any) -> reference_pb2.ComputeLogprobsResponse:
        rows = from_ragged(request.token_ids, "token_ids", np.int32)
        lengths = from_tensor(request.prompt_lengths, "prompt_lengths", np.int32)
        answer = [np.full(len(row) - length, -2.0, np.float32) for row, length in zip(rows, lengths, strict=True)]
        return reference_pb2.ComputeLogprobsResponse(logprobs=to_ragged(answer, np.float32))

    async def GetModel(self, request: Any, context: Any) -> reference_pb2.ReferenceServiceGetModelResponse:
        model = types_pb2.ModelInfo(name="r", max_sequence_tokens=1024, dtype=1)
        return reference_pb2.ReferenceServiceGetModelResponse(model=model)

    async def start(self) -> tuple[grpc.aio.Server, str]:
        server = grpc.aio.server()
        reward_pb2_grpc.add_RewardServiceServicer_to_server(self, server)
        reference_pb2_grpc.add_ReferenceServiceServicer_to_server(self, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, f"127.0.0.1:{port}"


async def until(condition: Any, replicas: Sequence[FakeReplica]) -> None:
    """Waits until the condition holds; looks again after each event at one of the replicas."""
    async with asyncio.timeout(30):
        while not condition():
            waits = [asyncio.ensure_future(replica.weights.until(condition)) for replica in replicas]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
