"""Clients of the policy service: responses with log-probs and the weights that made each token."""

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from typing import Any, Final, TypedDict, Unpack

import numpy as np

from steersman.client.calls import AsyncClient, Client
from steersman.client.prompts import prompt_to_proto
from steersman.client.types import FinishReason, IntArray, Prompt, Sample, SampleDelta
from steersman.v1 import policy_pb2, policy_pb2_grpc
from steersman.wire.convert import model_from_proto, span_from_proto
from steersman.wire.errors import Code, SteersmanError, invalid_field
from steersman.wire.identity import ModelInfo, VersionSpan

_FINISH: Final = {
    policy_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    policy_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    policy_pb2.FINISH_REASON_ABORTED: FinishReason.ABORTED,
}


class GenerateOptions(TypedDict, total=False):
    """How to draw. What is left out takes the default of the service; the service checks the ranges.

    Keys:
        num_samples: responses to draw, 1 to 256. Default 1.
        temperature: of the softmax, at least 0; 0 is greedy. Default 1.
        top_p: nucleus mass in (0, 1]. Default 1: off.
        top_k: keep the k most likely tokens; 0 is off. Default 0.
        max_tokens: longest response, at least 1. Default: what fits after the prompt.
        min_tokens: no end-of-sequence before so many tokens. Default 0.
        seed: same seed, prompt and weights give the same samples. Default: not repeatable.
        stop: texts that end a response, at most 16; stop_token_ids: ids that do, at most 64.
        ignore_eos: go on past end-of-sequence. Default False.
        priority: requests with a lower number go first. Default 0.
        return_text: also return the text. Default False.
    """

    num_samples: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int | None
    min_tokens: int
    seed: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    priority: int
    return_text: bool


def generate_request(
    prompt: Prompt, mode: "policy_pb2.OutputMode", options: GenerateOptions
) -> policy_pb2.GenerateRequest:
    """The request. Raises INVALID_FIELD for what does not fit its field's type."""
    drawing: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    priority = drawing.pop("priority", 0)
    return_text = drawing.pop("return_text", False)
    sampling = policy_pb2.SamplingParameters()
    for key, value in drawing.items():
        try:
            sampling.MergeFrom(policy_pb2.SamplingParameters(**{key: value}))
        except (TypeError, ValueError) as error:
            raise invalid_field(f"sampling.{key}", value, str(error)) from None
    return policy_pb2.GenerateRequest(
        sampling=sampling,
        output_mode=mode,
        priority=priority,
        return_text=return_text,
        **prompt_to_proto(prompt),
    )


def delta_from_proto(response: policy_pb2.GenerateResponse) -> SampleDelta:
    """The new tokens of one message."""
    return SampleDelta(
        index=response.sample_index,
        token_ids=np.array(response.token_ids, np.int32),
        logprobs=np.array(response.logprobs, np.float32),
        weight_versions=tuple(span_from_proto(span) for span in response.weight_versions),
        text=response.text,
        finish_reason=_FINISH.get(response.finish_reason),
        stop_reason=response.stop_reason,
    )


def _merge_spans(deltas: Sequence[SampleDelta]) -> tuple[VersionSpan, ...]:
    """Spans of all deltas, neighbours of the same version joined."""
    merged: list[VersionSpan] = []
    for span in (span for delta in deltas for span in delta.weight_versions):
        if merged and merged[-1].version == span.version and merged[-1].end == span.start:
            merged[-1] = VersionSpan(version=span.version, start=merged[-1].start, end=span.end)
        else:
            merged.append(span)
    return tuple(merged)


class SampleAssembler:
    """Puts the messages of one Generate stream together; works for deltas and for whole samples.

    Invariant: each sample is returned exactly once, by the message that ends it.
    """

    def __init__(self, request: policy_pb2.GenerateRequest) -> None:
        sampling = request.sampling
        self._num_samples = sampling.num_samples if sampling.HasField("num_samples") else 1
        self._open: dict[int, list[SampleDelta]] = {}
        self._num_finished = 0
        self._model: ModelInfo | None = None
        self._prompt: IntArray | None = None

    def add(self, response: policy_pb2.GenerateResponse) -> Sample | None:
        """Takes the next message; the sample that it ended, or None."""
        if response.HasField("model"):
            self._model = model_from_proto(response.model)
        if response.HasField("prompt_token_ids"):
            self._prompt = np.array(response.prompt_token_ids.ids, np.int32)
        delta = delta_from_proto(response)
        deltas = self._open.setdefault(delta.index, [])
        deltas.append(delta)
        if delta.finish_reason is None:
            return None
        del self._open[delta.index]
        self._num_finished += 1
        return Sample(
            index=delta.index,
            token_ids=np.concatenate([part.token_ids for part in deltas]),
            logprobs=np.concatenate([part.logprobs for part in deltas]),
            weight_versions=_merge_spans(deltas),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            text="".join(part.text for part in deltas),
            prompt_token_ids=self._prompt,
            model=self._model,
            time_to_first_token_seconds=response.time_to_first_token.ToTimedelta().total_seconds(),
        )

    def finish(self) -> None:
        """Raises if the stream ended before every sample did: what is missing must not look like an answer."""
        if self._num_finished != self._num_samples:
            message = f"the stream ended after {self._num_finished} of {self._num_samples} samples"
            raise SteersmanError(None, message, code=Code.DATA_LOSS)


class AsyncPolicyClient(AsyncClient):
    """Asyncio client of the policy service. Calls have 600 s unless `timeout` says otherwise."""

    default_timeout = 600.0
    _stub_type = policy_pb2_grpc.PolicyServiceStub

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> list[Sample]:
        """All samples of a prompt, ascending by index. `prompt` is token ids, text or a conversation."""
        async with aclosing(self.samples(prompt, timeout=timeout, **options)) as samples:
            return sorted([sample async for sample in samples], key=lambda sample: sample.index)

    async def samples(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Sample, None]:
        """Each sample as soon as it has ended, in order of their ends. Leaving the iterator aborts the rest."""
        request = generate_request(prompt, policy_pb2.OUTPUT_MODE_FINAL, options)
        assembler = SampleAssembler(request)
        async with aclosing(self._stream(self._stub.Generate, request, timeout, retry=True)) as responses:
            async for response in responses:
                if (sample := assembler.add(response)) is not None:
                    yield sample
        assembler.finish()

    async def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[SampleDelta, None]:
        """Tokens as they are made, of all samples, told apart by `index`. Leaving the iterator aborts the rest."""
        request = generate_request(prompt, policy_pb2.OUTPUT_MODE_DELTA, options)
        async with aclosing(self._stream(self._stub.Generate, request, timeout, retry=True)) as responses:
            async for response in responses:
                yield delta_from_proto(response)

    async def model(self, *, timeout: float | None = 30.0) -> ModelInfo:
        """The model and the weights that are served."""
        request = policy_pb2.PolicyServiceGetModelRequest()
        return model_from_proto((await self._call(self._stub.GetModel, request, timeout)).model)


class PolicyClient(Client):
    """Blocking client of the policy service. Calls have 600 s unless `timeout` says otherwise."""

    default_timeout = 600.0
    _stub_type = policy_pb2_grpc.PolicyServiceStub

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> list[Sample]:
        """All samples of a prompt, ascending by index. `prompt` is token ids, text or a conversation."""
        samples = list(self.samples(prompt, timeout=timeout, **options))
        return sorted(samples, key=lambda sample: sample.index)

    def samples(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[Sample, None, None]:
        """Each sample as soon as it has ended, in order of their ends. Leaving the iterator aborts the rest."""
        request = generate_request(prompt, policy_pb2.OUTPUT_MODE_FINAL, options)
        assembler = SampleAssembler(request)
        with closing(self._stream(self._stub.Generate, request, timeout, retry=True)) as responses:
            for response in responses:
                if (sample := assembler.add(response)) is not None:
                    yield sample
        assembler.finish()

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[SampleDelta, None, None]:
        """Tokens as they are made, of all samples, told apart by `index`. Leaving the iterator aborts the rest."""
        request = generate_request(prompt, policy_pb2.OUTPUT_MODE_DELTA, options)
        with closing(self._stream(self._stub.Generate, request, timeout, retry=True)) as responses:
            for response in responses:
                yield delta_from_proto(response)

    def model(self, *, timeout: float | None = 30.0) -> ModelInfo:
        """The model and the weights that are served."""
        request = policy_pb2.PolicyServiceGetModelRequest()
        return model_from_proto(self._call(self._stub.GetModel, request, timeout).model)
