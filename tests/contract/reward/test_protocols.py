"""Protocols of others on the port of the reward service: Open Inference and Text Embeddings Inference."""

import struct
from collections.abc import AsyncIterator, Sequence

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steersman.reward.compat import open_inference_pb2 as oip
from steersman.reward.compat import open_inference_pb2_grpc as oip_grpc
from steersman.reward.compat import tei_pb2, tei_pb2_grpc
from steersman.reward.function_scorer import FunctionScorer
from steersman.reward.handler import RewardHandler
from steersman.reward.plugin import ScorerInput
from steersman.reward.servicer import RewardService
from steersman.reward.settings import FunctionScorerSettings
from steersman.serving.metrics import Metrics
from steersman.serving.server import start_server
from steersman.serving.settings import ServerSettings

TIMEOUT = 20
Input = oip.ModelInferRequest.InferInputTensor


def length(items: Sequence[ScorerInput]) -> list[float | None]:
    """The length of the response, less that of the prompt; None for a bad one."""
    return [None if item.response == "bad" else float(len(item.response) - len(item.prompt)) for item in items]


def one(items: Sequence[ScorerInput]) -> list[float | None]:
    return [1.0 for _ in items]


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    scorers = {
        function.__name__: FunctionScorer(function.__name__, function, FunctionScorerSettings(function="m:f"))
        for function in (length, one)
    }
    server = await start_server(RewardService(RewardHandler(scorers, "length")), ServerSettings(), Metrics("reward"))
    async with grpc.aio.insecure_channel(server.address) as found:
        yield found
    await server.stop()


@pytest.fixture
def inference(channel) -> oip_grpc.GRPCInferenceServiceStub:
    return oip_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture
def predict(channel) -> tei_pb2_grpc.PredictStub:
    return tei_pb2_grpc.PredictStub(channel)


def texts(name: str, *values: str, shape: list[int] | None = None) -> Input:
    contents = oip.InferTensorContents(bytes_contents=[value.encode() for value in values])
    return Input(name=name, datatype="BYTES", shape=shape or [len(values)], contents=contents)


async def test_open_inference_tells_what_is_there(inference, channel):
    assert (await inference.ServerLive(oip.ServerLiveRequest(), timeout=TIMEOUT)).live
    assert (await inference.ServerReady(oip.ServerReadyRequest(), timeout=TIMEOUT)).ready
    assert (await inference.ServerMetadata(oip.ServerMetadataRequest(), timeout=TIMEOUT)).name == "steersman-reward"
    for name, ready in {"one": True, "": True, "none": False}.items():
        assert (await inference.ModelReady(oip.ModelReadyRequest(name=name), timeout=TIMEOUT)).ready is ready
    found = await inference.ModelMetadata(oip.ModelMetadataRequest(), timeout=TIMEOUT)
    assert found.name == "length"
    assert [(tensor.name, tensor.datatype) for tensor in found.outputs] == [("score", "FP32")]
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("inference.GRPCInferenceService", "tei.v1.Predict"):
        request = health_pb2.HealthCheckRequest(service=service)
        assert (await health.Check(request, timeout=TIMEOUT)).status == health_pb2.HealthCheckResponse.SERVING


async def test_open_inference_scores_typed_and_raw_tensors(inference):
    request = oip.ModelInferRequest(
        id="7", inputs=[texts("prompt", "a", "b", shape=[2, 1]), texts("response", "x", "yyy")]
    )
    response = await inference.ModelInfer(request, timeout=TIMEOUT)
    assert (response.id, response.model_name) == ("7", "length")
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("score", "FP32", [2])
    assert list(output.contents.fp32_contents) == [0.0, 2.0]
    raw = b"".join(struct.pack("<I", len(text)) + text for text in (b"four", "é".encode()))
    request = oip.ModelInferRequest(
        inputs=[Input(name="text", datatype="BYTES", shape=[2])], raw_input_contents=[raw], model_name="length"
    )
    response = await inference.ModelInfer(request, timeout=TIMEOUT)
    assert np.frombuffer(response.raw_output_contents[0], "<f4").tolist() == [4.0, 1.0]
    assert not response.outputs[0].contents.fp32_contents


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (oip.ModelInferRequest(), "INVALID_ARGUMENT", "inputs"),
        (oip.ModelInferRequest(model_name="none", inputs=[texts("text", "a")]), "NOT_FOUND", "length"),
        (oip.ModelInferRequest(model_version="9", inputs=[texts("text", "a")]), "NOT_FOUND", "9"),
        (oip.ModelInferRequest(inputs=[texts("text", "a", shape=[2])]), "INVALID_ARGUMENT", "inputs.text.shape"),
        (oip.ModelInferRequest(inputs=[Input(name="text", datatype="FP32")]), "INVALID_ARGUMENT", "datatype"),
        (
            oip.ModelInferRequest(inputs=[texts("prompt", "a"), texts("response", "b", "c")]),
            "INVALID_ARGUMENT",
            "one for",
        ),
        (
            oip.ModelInferRequest(inputs=[texts("text", "a")], raw_input_contents=[b"\x09\0\0\0a"]),
            "INVALID_ARGUMENT",
            "9 bytes",
        ),
        (oip.ModelInferRequest(inputs=[texts("text", "a")], raw_input_contents=[b"\x09"]), "INVALID_ARGUMENT", "half"),
        (
            oip.ModelInferRequest(inputs=[texts("text", "a")], raw_input_contents=[b"", b""]),
            "INVALID_ARGUMENT",
            "raw_input",
        ),
        (oip.ModelInferRequest(inputs=[texts("text", "a")], outputs=[{"name": "x"}]), "INVALID_ARGUMENT", "outputs"),
        (oip.ModelInferRequest(inputs=[texts("text", "ok", "bad")]), "INTERNAL", "1 of 2 items failed (1)"),
    ],
)
async def test_open_inference_says_what_is_wrong(inference, request_, code, words):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await inference.ModelInfer(request_, timeout=TIMEOUT)
    assert error.value.code().name == code
    assert words in error.value.details()


async def test_tei_predicts_texts_and_pairs(predict, channel):
    response = await predict.Predict(tei_pb2.PredictRequest(inputs="four", raw_scores=True), timeout=TIMEOUT)
    assert [one.score for one in response.predictions] == [4.0]
    assert response.metadata.compute_chars == 4
    response = await predict.Predict(tei_pb2.PredictRequest(inputs="four"), timeout=TIMEOUT)
    assert response.predictions[0].score == pytest.approx(1 / (1 + np.exp(-4.0)))
    pair = tei_pb2.PredictPairRequest(inputs=["ab", "four"], raw_scores=True)
    assert (await predict.PredictPair(pair, timeout=TIMEOUT)).predictions[0].score == 2.0
    info = await tei_pb2_grpc.InfoStub(channel).Info(tei_pb2.InfoRequest(), timeout=TIMEOUT)
    assert (info.model_id, info.model_type) == ("length", tei_pb2.MODEL_TYPE_CLASSIFIER)


async def test_tei_streams_answer_in_order(predict):
    async def requests():
        for n in range(600):
            yield tei_pb2.PredictRequest(inputs="x" * (n + 1), raw_scores=True)

    found = [response.predictions[0].score async for response in predict.PredictStream(requests(), timeout=TIMEOUT)]
    assert found == [float(n + 1) for n in range(600)]


async def test_a_bad_text_ends_a_tei_stream_and_says_why(predict):
    async def requests():
        for inputs in (["a", "b"], ["a"], ["c", "d"]):
            yield tei_pb2.PredictPairRequest(inputs=inputs)

    stream = predict.PredictPairStream(requests(), timeout=TIMEOUT)
    with pytest.raises(grpc.aio.AioRpcError, match="a prompt and a response"):
        _ = [response async for response in stream]
    with pytest.raises(grpc.aio.AioRpcError, match="at least 1 character"):
        await predict.Predict(tei_pb2.PredictRequest(), timeout=TIMEOUT)
