"""The Open Inference Protocol in front of the scorers, for KServe's and Triton's clients.

A scorer is a model. Its inputs are `text` (BYTES [N]: prompt and response in one), or `prompt` and `response` (BYTES
[N] each); its output is `score` (FP32 [N]). Parameters of the call: `raw` (bool: without normalisation and penalties),
`truncate_prompt` (bool). The protocol has no place for an item that failed: one fails the call, whose error names it.
"""

import struct
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final

import grpc
import numpy as np

from steersman.reward.compat import open_inference_pb2, open_inference_pb2_grpc
from steersman.reward.handler import RewardHandler
from steersman.reward.outcomes import require_scores
from steersman.reward.types import ScoreItem, ScoreOptions, ScorerInfo, TextContent
from steersman.wire.errors import SteersmanError, invalid_field, not_found

Context = grpc.aio.ServicerContext[Any, Any]
Inputs = Sequence[open_inference_pb2.ModelInferRequest.InferInputTensor]

SERVICE: Final = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_ALLOWED_INPUTS: Final = "text, or prompt and response"


class OpenInferenceServicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Converts, calls the handler, converts."""

    def __init__(self, handler: RewardHandler) -> None:
        self._handler = handler

    async def ServerLive(self, request: Any, context: Context) -> open_inference_pb2.ServerLiveResponse:  # noqa: N802
        """Answers, so it lives."""
        return open_inference_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Context) -> open_inference_pb2.ServerReadyResponse:  # noqa: N802
        """Ready while the scorers can score."""
        try:
            await self._handler.check_health()
        except Exception:
            return open_inference_pb2.ServerReadyResponse(ready=False)
        return open_inference_pb2.ServerReadyResponse(ready=True)

    async def ModelReady(  # noqa: N802
        self, request: open_inference_pb2.ModelReadyRequest, context: Context
    ) -> open_inference_pb2.ModelReadyResponse:
        """Ready if it is there."""
        try:
            self._find(request.name, request.version)
        except SteersmanError:
            return open_inference_pb2.ModelReadyResponse(ready=False)
        return open_inference_pb2.ModelReadyResponse(ready=True)

    async def ServerMetadata(  # noqa: N802
        self, request: Any, context: Context
    ) -> open_inference_pb2.ServerMetadataResponse:
        """Name and version."""
        return open_inference_pb2.ServerMetadataResponse(name="steersman-reward", version=version("steersman"))

    async def ModelMetadata(  # noqa: N802
        self, request: open_inference_pb2.ModelMetadataRequest, context: Context
    ) -> open_inference_pb2.ModelMetadataResponse:
        """The tensors of a scorer: the same for all."""
        scorer = self._find(request.name, request.version)
        tensor = open_inference_pb2.ModelMetadataResponse.TensorMetadata
        return open_inference_pb2.ModelMetadataResponse(
            name=scorer.name,
            versions=[_revision(scorer)],
            platform="steersman",
            inputs=[tensor(name=name, datatype="BYTES", shape=[-1]) for name in ("prompt", "response")],
            outputs=[tensor(name="score", datatype="FP32", shape=[-1])],
        )

    async def ModelInfer(  # noqa: N802
        self, request: open_inference_pb2.ModelInferRequest, context: Context
    ) -> open_inference_pb2.ModelInferResponse:
        """Scores every text."""
        scorer = self._find(request.model_name, request.model_version)
        wanted = [output.name for output in request.outputs]
        if wanted not in ([], ["score"]):
            raise invalid_field("outputs", wanted, "score")
        raw = request.parameters["raw"].bool_param
        options = ScoreOptions(
            scorer=scorer.name, truncate_prompt=request.parameters["truncate_prompt"].bool_param, include_raw=raw
        )
        scores = require_scores(await self._handler.score(_items(request), options))
        values = [score.raw if raw and score.raw is not None else score.value for score in scores]
        output = open_inference_pb2.ModelInferResponse.InferOutputTensor(
            name="score", datatype="FP32", shape=[len(values)]
        )
        response = open_inference_pb2.ModelInferResponse(
            model_name=scorer.name, model_version=_revision(scorer), id=request.id
        )
        if request.raw_input_contents:  # answered the way it asked
            response.raw_output_contents.append(np.array(values, "<f4").tobytes())
        else:
            output.contents.fp32_contents.extend(values)
        response.outputs.append(output)
        return response

    def _find(self, name: str, revision: str) -> ScorerInfo:
        scorers = self._handler.scorers()
        for scorer in scorers:
            if scorer.name == name or (not name and scorer.is_default):
                if revision and revision != _revision(scorer):
                    raise not_found(f"version of {scorer.name}", revision, [_revision(scorer)])
                return scorer
        raise not_found("model", name, [scorer.name for scorer in scorers])


def _revision(scorer: ScorerInfo) -> str:
    return scorer.model.revision if scorer.model is not None else "1"


def _items(request: open_inference_pb2.ModelInferRequest) -> list[ScoreItem]:
    texts = {tensor.name: _texts(request, index) for index, tensor in enumerate(request.inputs)}
    if set(texts) == {"text"}:
        pairs = [("", text) for text in texts["text"]]
    elif set(texts) == {"prompt", "response"}:
        prompts, responses = texts["prompt"], texts["response"]
        if len(prompts) != len(responses):
            raise invalid_field("inputs.prompt", f"{len(prompts)} texts", f"{len(responses)}, one for each response")
        pairs = list(zip(prompts, responses, strict=True))
    else:
        raise invalid_field("inputs", sorted(texts), _ALLOWED_INPUTS)
    return [
        ScoreItem(id=str(index), content=TextContent(prompt=prompt, response=response))
        for index, (prompt, response) in enumerate(pairs)
    ]


def _texts(request: open_inference_pb2.ModelInferRequest, index: int) -> list[str]:
    tensor = request.inputs[index]
    field = f"inputs.{tensor.name}"
    if tensor.datatype != "BYTES":
        raise invalid_field(f"{field}.datatype", tensor.datatype, "BYTES")
    if not request.raw_input_contents:
        elements = list(tensor.contents.bytes_contents)
    elif len(request.raw_input_contents) != len(request.inputs):
        allowed = f"{len(request.inputs)}, one for each input"
        raise invalid_field("raw_input_contents", len(request.raw_input_contents), allowed)
    else:
        elements = _split(request.raw_input_contents[index], field)
    size = int(np.prod(list(tensor.shape), dtype=object)) if tensor.shape else 0
    if size != len(elements):
        raise invalid_field(f"{field}.shape", list(tensor.shape), f"a product of {len(elements)}, as many as elements")
    try:
        return [element.decode() for element in elements]
    except UnicodeDecodeError as error:
        raise invalid_field(field, "bytes that are not UTF-8", "UTF-8 text") from error


def _split(data: bytes, field: str) -> list[bytes]:
    """Elements of a raw BYTES tensor: each after its length, 4 bytes little-endian."""
    elements, start = [], 0
    while start < len(data):
        if start + 4 > len(data):
            raise invalid_field(field, "half a length", "4 bytes before each text")
        (length,) = struct.unpack_from("<I", data, start)
        start += 4 + length
        if start > len(data):
            raise invalid_field(field, f"a text of {length} bytes", "no more bytes than are there")
        elements.append(data[start - length : start])
    return elements
