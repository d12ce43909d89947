"""The reference service on the wire: messages to plain values and back."""

from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np

from steersman.reference.engine.port import LogprobRow
from steersman.reference.handler import LogprobRequest, ReferenceHandler
from steersman.v1 import reference_pb2, reference_pb2_grpc
from steersman.wire.convert import model_to_proto
from steersman.wire.identity import ModelInfo
from steersman.wire.tensors import from_ragged, from_tensor, to_ragged


class ReferenceServicer(reference_pb2_grpc.ReferenceServiceServicer):
    """Converts, calls the handler, converts."""

    def __init__(self, handler: ReferenceHandler) -> None:
        self._handler = handler

    async def ComputeLogprobs(  # noqa: N802
        self, request: reference_pb2.ComputeLogprobsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> reference_pb2.ComputeLogprobsResponse:
        """Log-probs of the response tokens."""
        rows = await self._handler.compute_logprobs(request_from_proto(request))
        return rows_to_proto(rows, self._handler.model)

    async def GetModel(  # noqa: N802
        self,
        request: reference_pb2.ReferenceServiceGetModelRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> reference_pb2.ReferenceServiceGetModelResponse:
        """The model that is served."""
        return reference_pb2.ReferenceServiceGetModelResponse(model=model_to_proto(self._handler.model))


class ReferenceService:
    """The reference service as `serving` runs it."""

    name = "reference"

    def __init__(self, handler: ReferenceHandler) -> None:
        self._handler = handler

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """See `Service.register`."""
        reference_pb2_grpc.add_ReferenceServiceServicer_to_server(ReferenceServicer(self._handler), server)
        return [reference_pb2.DESCRIPTOR.services_by_name["ReferenceService"].full_name]

    async def check_health(self) -> None:
        """See `Service.check_health`."""
        await self._handler.check_health()

    async def drain(self) -> None:
        """Nothing to hurry: calls that are in flight are answered from the queue."""

    async def close(self) -> None:
        """See `Service.close`."""
        await self._handler.close()


def request_from_proto(message: reference_pb2.ComputeLogprobsRequest) -> LogprobRequest:
    """The request as arrays that share the memory of the message. Raises INVALID_FIELD if it is malformed."""
    prompt_lengths = None
    if message.HasField("prompt_lengths"):
        prompt_lengths = from_tensor(message.prompt_lengths, "prompt_lengths", np.int32)
    return LogprobRequest(
        token_ids=from_ragged(message.token_ids, "token_ids", np.int32),
        prompt_lengths=prompt_lengths,
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        include_entropy=message.include_entropy,
    )


def rows_to_proto(rows: Sequence[LogprobRow], model: ModelInfo) -> reference_pb2.ComputeLogprobsResponse:
    """The response to a request."""
    response = reference_pb2.ComputeLogprobsResponse(
        logprobs=to_ragged([row.logprobs for row in rows], np.float32), model=model_to_proto(model)
    )
    entropies = [row.entropies for row in rows if row.entropies is not None]
    if entropies:
        response.entropies.CopyFrom(to_ragged(entropies, np.float32))
    return response
