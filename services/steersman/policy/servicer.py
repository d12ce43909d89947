"""PolicyService: converts, calls the handler, converts."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any, Final

import grpc

from steersman.policy.engine.port import FinishReason, GenerationRequest, SampleDelta
from steersman.policy.handler import GenerateCall, GenerationHandler
from steersman.v1 import policy_pb2, policy_pb2_grpc, types_pb2
from steersman.wire.convert import model_to_proto, span_to_proto
from steersman.wire.errors import invalid_field

Context = grpc.aio.ServicerContext[Any, Any]

_FINISH_REASONS: Final = {
    None: policy_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: policy_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: policy_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: policy_pb2.FINISH_REASON_ABORTED,
}


class PolicyServicer(policy_pb2_grpc.PolicyServiceServicer):
    """Generation over gRPC."""

    def __init__(self, handler: GenerationHandler) -> None:
        self._handler = handler

    async def Generate(  # noqa: N802
        self, request: policy_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[policy_pb2.GenerateResponse, None]:
        """Streams samples; the end of the call ends them."""
        call = _call(request)
        checked = self._handler.check(call)
        first: policy_pb2.GenerateResponse | None = self._first(call, checked)
        async with contextlib.aclosing(self._handler.generate(checked)) as deltas:
            async for delta in deltas:
                response = _response(delta)
                if first is not None:
                    response.MergeFrom(first)
                    first = None
                yield response

    async def GetModel(  # noqa: N802
        self, request: policy_pb2.PolicyServiceGetModelRequest, context: Context
    ) -> policy_pb2.PolicyServiceGetModelResponse:
        """The model that is served."""
        return policy_pb2.PolicyServiceGetModelResponse(model=model_to_proto(self._handler.model()))

    def _first(self, call: GenerateCall, request: GenerationRequest) -> policy_pb2.GenerateResponse:
        """What the first message carries beside its tokens."""
        rendered = call.prompt_token_ids is None
        return policy_pb2.GenerateResponse(
            model=model_to_proto(self._handler.model()),
            prompt_token_ids=types_pb2.TokenIds(ids=request.prompt_token_ids) if rendered else None,
        )


def _call(request: policy_pb2.GenerateRequest) -> GenerateCall:
    sampling, prompt = request.sampling, request.WhichOneof("prompt")
    if request.output_mode not in policy_pb2.OutputMode.values():
        raise invalid_field("output_mode", request.output_mode, "an OutputMode")

    def given(name: str) -> Any:
        return getattr(sampling, name) if sampling.HasField(name) else None  # type: ignore[arg-type]

    turns = [(message.role, message.content) for message in request.chat.messages]
    return GenerateCall(
        prompt_token_ids=list(request.prompt_token_ids.ids) if prompt == "prompt_token_ids" else None,
        chat=turns if prompt == "chat" else None,
        text=request.text if prompt == "text" else None,
        num_samples=given("num_samples"),
        temperature=given("temperature"),
        top_p=given("top_p"),
        top_k=given("top_k"),
        max_tokens=given("max_tokens"),
        min_tokens=given("min_tokens"),
        seed=given("seed"),
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        final_only=request.output_mode == policy_pb2.OUTPUT_MODE_FINAL,
        priority=request.priority,
        return_text=request.return_text,
    )


def _response(delta: SampleDelta) -> policy_pb2.GenerateResponse:
    response = policy_pb2.GenerateResponse(
        sample_index=delta.index,
        token_ids=delta.token_ids,
        logprobs=delta.logprobs,
        weight_versions=[span_to_proto(span) for span in delta.versions],
        finish_reason=_FINISH_REASONS[delta.finish_reason],
        stop_reason=delta.stop_reason,
        text=delta.text,
    )
    if delta.time_to_first_token_s is not None:
        response.time_to_first_token.FromNanoseconds(round(delta.time_to_first_token_s * 1e9))
    return response
