"""Clients of the reference service: log-probs of given sequences under the frozen model."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from steersman.client.calls import AsyncClient, Client, gather_bounded, map_bounded
from steersman.client.prompts import token_array
from steersman.client.splitting import MAX_PARTS_IN_FLIGHT, split
from steersman.client.types import Logprobs, TokenIds
from steersman.v1 import reference_pb2, reference_pb2_grpc
from steersman.wire.convert import model_from_proto
from steersman.wire.errors import Code, SteersmanError, invalid_field
from steersman.wire.identity import ModelInfo
from steersman.wire.tensors import from_ragged, to_ragged, to_tensor


def logprob_requests(
    sequences: Sequence[TokenIds], prompt_lengths: Sequence[int] | int | None, temperature: float, entropy: bool
) -> list[reference_pb2.ComputeLogprobsRequest]:
    """The requests for a batch of any size, in order. Raises INVALID_FIELD for malformed sequences or lengths."""
    rows = [token_array(row, f"sequences[{index}]") for index, row in enumerate(sequences)]
    if prompt_lengths is None:
        prompt_lengths = 1
    lengths = [prompt_lengths] * len(rows) if isinstance(prompt_lengths, int) else list(prompt_lengths)
    if len(lengths) != len(rows):
        raise invalid_field("prompt_lengths", f"{len(lengths)} entries", f"{len(rows)}, one a sequence")
    for index, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        if len(row) < 2:
            raise invalid_field(f"sequences[{index}]", f"{len(row)} tokens", "at least 2 tokens")
        if not 1 <= length < len(row):
            allowed = f"1 to {len(row) - 1} for a sequence of {len(row)} tokens"
            raise invalid_field(f"prompt_lengths[{index}]", length, allowed)
    return [
        reference_pb2.ComputeLogprobsRequest(
            token_ids=to_ragged(rows[part.start : part.stop], np.int32),
            prompt_lengths=to_tensor(np.array(lengths[part.start : part.stop], np.int32)),
            temperature=temperature,
            include_entropy=entropy,
        )
        for part in split([row.nbytes for row in rows])
    ]


def _logprobs_from_proto(
    requests: Sequence[reference_pb2.ComputeLogprobsRequest],
    responses: Sequence[reference_pb2.ComputeLogprobsResponse],
    entropy: bool,
) -> Logprobs:
    """One result from the answers to all parts."""
    result = Logprobs(
        logprobs=[],
        entropies=[] if entropy else None,
        model=model_from_proto(responses[0].model) if responses else None,
    )
    for request, response in zip(requests, responses, strict=True):
        rows = from_ragged(response.logprobs, "logprobs", np.float32)
        if len(rows) != request.prompt_lengths.shape[0]:
            message = f"{len(rows)} rows of log-probs came for {request.prompt_lengths.shape[0]} sequences"
            raise SteersmanError(None, message, code=Code.DATA_LOSS)
        result.logprobs.extend(rows)
        if result.entropies is not None:
            result.entropies.extend(from_ragged(response.entropies, "entropies", np.float32))
    return result


class AsyncReferenceClient(AsyncClient):
    """Asyncio client of the reference service. Calls have 300 s unless `timeout` says otherwise."""

    default_timeout = 300.0
    _stub_type = reference_pb2_grpc.ReferenceServiceStub

    async def logprobs(
        self,
        sequences: Sequence[TokenIds],
        prompt_lengths: Sequence[int] | int | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        timeout: float | None = None,
    ) -> Logprobs:
        """Log-probs of the response tokens of each sequence.

        Args:
            sequences: token ids, prompt followed by response, at least two tokens each. Any number of them: large
                batches travel in several calls at once.
            prompt_lengths: tokens of each prompt, or one number for all; from 1 to the sequence length - 1.
                Default 1: every token but the first counts as response.
            temperature: logits are divided by it, 0.01 to 100.
            entropy: also return the entropy of each distribution.
        """
        requests = logprob_requests(sequences, prompt_lengths, temperature, entropy)
        deadline = self._deadline(timeout)
        calls = [partial(self._call, self._stub.ComputeLogprobs, request, deadline) for request in requests]
        return _logprobs_from_proto(requests, await gather_bounded(calls, MAX_PARTS_IN_FLIGHT), entropy)

    async def model(self, *, timeout: float | None = 30.0) -> ModelInfo:
        """The model that is served."""
        request = reference_pb2.ReferenceServiceGetModelRequest()
        return model_from_proto((await self._call(self._stub.GetModel, request, timeout)).model)


class ReferenceClient(Client):
    """Blocking client of the reference service. Calls have 300 s unless `timeout` says otherwise."""

    default_timeout = 300.0
    _stub_type = reference_pb2_grpc.ReferenceServiceStub

    def logprobs(
        self,
        sequences: Sequence[TokenIds],
        prompt_lengths: Sequence[int] | int | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        timeout: float | None = None,
    ) -> Logprobs:
        """Log-probs of the response tokens of each sequence; as `AsyncReferenceClient.logprobs`."""
        requests = logprob_requests(sequences, prompt_lengths, temperature, entropy)
        deadline = self._deadline(timeout)
        calls = [partial(self._call, self._stub.ComputeLogprobs, request, deadline) for request in requests]
        return _logprobs_from_proto(requests, map_bounded(calls, MAX_PARTS_IN_FLIGHT), entropy)

    def model(self, *, timeout: float | None = 30.0) -> ModelInfo:
        """The model that is served."""
        request = reference_pb2.ReferenceServiceGetModelRequest()
        return model_from_proto(self._call(self._stub.GetModel, request, timeout).model)
