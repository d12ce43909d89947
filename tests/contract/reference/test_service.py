"""The reference service behind a real grpc.aio server."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from transformers import Qwen2Config, Qwen2ForCausalLM

from steersman.reference.engine.port import LogprobQuery, LogprobRow
from steersman.reference.engine.torch_engine import TorchLogprobEngine
from steersman.reference.handler import ReferenceHandler
from steersman.reference.servicer import ReferenceService
from steersman.serving.batch_metrics import BatchMetrics
from steersman.serving.batching import BatchingSettings
from steersman.serving.metrics import Metrics
from steersman.serving.server import start_server
from steersman.serving.settings import ServerSettings
from steersman.v1 import reference_pb2, reference_pb2_grpc, types_pb2
from steersman.wire.identity import ModelInfo
from steersman.wire.tensors import from_ragged, to_ragged, to_tensor

VOCAB = 50
MODEL = ModelInfo(name="tiny", revision="r1", vocab_size=VOCAB, max_sequence_tokens=32, eos_token_ids=(2,))
TIMEOUT = 20


class GatedEngine:
    """Answers zeros when the test lets it."""

    model = MODEL
    shares_prefixes = False

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.batches: list[int] = []

    def compute(self, queries: Sequence[LogprobQuery]) -> list[LogprobRow]:
        self.batches.append(len(queries))
        self.entered.release()
        assert self.gate.wait(TIMEOUT)
        return [
            LogprobRow(logprobs=np.zeros(len(query.token_ids) - query.prompt_length, np.float32)) for query in queries
        ]


@asynccontextmanager
async def serving(
    engine, metrics: Metrics | None = None, **batching
) -> AsyncIterator[reference_pb2_grpc.ReferenceServiceStub]:
    metrics = metrics or Metrics("reference")
    observer = BatchMetrics(metrics).observer("reference")
    handler = ReferenceHandler(engine, BatchingSettings(**batching), observer=observer)
    server = await start_server(ReferenceService(handler), ServerSettings(), metrics)
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield reference_pb2_grpc.ReferenceServiceStub(channel)
    finally:
        await server.stop()


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return Qwen2ForCausalLM(config).eval()


def ask(rows: Sequence[Sequence[int]], **fields) -> reference_pb2.ComputeLogprobsRequest:
    return reference_pb2.ComputeLogprobsRequest(token_ids=to_ragged(rows, np.int32), **fields)


def details_of(error: grpc.aio.AioRpcError) -> tuple[str, str, float | None]:
    """Reason, first bad field, and retry delay of an error."""
    status = rpc_status.from_call(error)
    assert status is not None
    reason, field, retry = "", "", None
    for detail in status.details:
        info, bad, delay = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad):
            field = bad.field_violations[0].field
        elif detail.Unpack(delay):
            retry = delay.retry_delay.ToTimedelta().total_seconds()
    return reason, field, retry


async def test_logprobs_equal_those_of_the_model(model):
    rows = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    async with serving(TorchLogprobEngine(model, MODEL)) as stub:
        request = ask(
            rows, prompt_lengths=to_tensor(np.array([2, 1, 1], np.int32)), temperature=0.7, include_entropy=True
        )
        response = await stub.ComputeLogprobs(request, timeout=TIMEOUT)
    logprobs = from_ragged(response.logprobs, "logprobs", np.float32)
    entropies = from_ragged(response.entropies, "entropies", np.float32)
    for ids, start, got, entropy in zip(rows, [2, 1, 1], logprobs, entropies, strict=True):
        with torch.no_grad():
            expected = torch.log_softmax(model(torch.tensor([ids])).logits[0] / 0.7, -1)[start - 1 : -1]
        wanted = expected.gather(1, torch.tensor(ids[start:])[:, None]).squeeze(1)
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5)
        np.testing.assert_allclose(entropy, -(expected.exp() * expected).sum(-1).numpy(), atol=1e-5)
    assert response.model.name == "tiny"
    assert response.model.revision == "r1"


async def test_defaults_are_the_whole_sequence_at_temperature_one(model):
    async with serving(TorchLogprobEngine(model, MODEL)) as stub:
        response = await stub.ComputeLogprobs(ask([[5, 6, 7]]), timeout=TIMEOUT)
    (row,) = from_ragged(response.logprobs, "logprobs", np.float32)
    assert len(row) == 2
    assert not response.HasField("entropies")


async def test_get_model(model):
    async with serving(TorchLogprobEngine(model, MODEL)) as stub:
        response = await stub.GetModel(reference_pb2.ReferenceServiceGetModelRequest(), timeout=TIMEOUT)
    assert response.model.vocab_size == VOCAB
    assert response.model.max_sequence_tokens == 32
    assert list(response.model.eos_token_ids) == [2]
    assert response.model.dtype == types_pb2.DATA_TYPE_FLOAT32


def with_offsets(offsets: list[int]) -> reference_pb2.ComputeLogprobsRequest:
    request = ask([[1, 2, 3]])
    request.token_ids.offsets.CopyFrom(to_tensor(np.array(offsets, np.int32)))
    return request


@pytest.mark.parametrize(
    ("request_message", "reason", "field"),
    [
        (reference_pb2.ComputeLogprobsRequest(), "INVALID_FIELD", "token_ids.values.dtype"),
        (ask([]), "INVALID_FIELD", "token_ids"),
        (ask([[1, 2], []]), "INVALID_FIELD", "token_ids[1]"),
        (ask([[1, 2], [3]]), "INVALID_FIELD", "token_ids[1]"),
        (ask([[1] * 33]), "SEQUENCE_TOO_LONG", "token_ids[0]"),
        (ask([[1, 2], [1, VOCAB]]), "TOKEN_OUT_OF_VOCABULARY", "token_ids[1][1]"),
        (ask([[1, -2]]), "TOKEN_OUT_OF_VOCABULARY", "token_ids[0][1]"),
        (ask([[1, 2]] * 1025), "REQUEST_TOO_LARGE", "token_ids"),
        (with_offsets([0, 5]), "INVALID_FIELD", "token_ids.offsets"),
        (with_offsets([0, 3, 2, 3]), "INVALID_FIELD", "token_ids.offsets"),
        (ask([[1, 2]], temperature=0.0), "INVALID_FIELD", "temperature"),
        (ask([[1, 2]], temperature=float("nan")), "INVALID_FIELD", "temperature"),
        (ask([[1, 2]], prompt_lengths=to_tensor(np.array([2], np.int32))), "INVALID_FIELD", "prompt_lengths[0]"),
        (ask([[1, 2]], prompt_lengths=to_tensor(np.array([1.0]))), "INVALID_FIELD", "prompt_lengths.dtype"),
        (ask([[1, 2]], prompt_lengths=to_tensor(np.array([[1]], np.int32))), "INVALID_FIELD", "prompt_lengths.shape"),
    ],
)
async def test_a_bad_request_is_named_and_the_service_goes_on(model, request_message, reason, field):
    async with serving(TorchLogprobEngine(model, MODEL)) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.ComputeLogprobs(request_message, timeout=TIMEOUT)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details_of(raised.value)[:2] == (reason, field)
        await stub.ComputeLogprobs(ask([[1, 2]]), timeout=TIMEOUT)


async def test_a_model_that_gives_nan_fails_the_call(model):
    broken = Qwen2ForCausalLM(model.config).eval()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    async with serving(TorchLogprobEngine(broken, MODEL)) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.ComputeLogprobs(ask([[1, 2]]), timeout=TIMEOUT)
    assert raised.value.code() is grpc.StatusCode.INTERNAL
    assert details_of(raised.value)[0] == "NOT_FINITE"


async def until_queued(metrics: Metrics, num_items: int) -> None:
    """Waits for a metric, the only thing outside that shows a call is in the queue."""
    async with asyncio.timeout(TIMEOUT):
        while metrics.registry.get_sample_value("steersman_queue_depth", {"batcher": "reference"}) != num_items:
            await asyncio.sleep(0.001)


async def test_a_full_queue_says_when_to_try_again():
    engine, metrics = GatedEngine(), Metrics("reference")
    async with serving(engine, metrics, max_queue_items=2) as stub:
        running = stub.ComputeLogprobs(ask([[1, 2]]), timeout=TIMEOUT)
        assert await asyncio.to_thread(engine.entered.acquire, timeout=TIMEOUT)
        waiting = stub.ComputeLogprobs(ask([[1, 2]] * 2), timeout=TIMEOUT)
        await until_queued(metrics, 2)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.ComputeLogprobs(ask([[1, 2]]), timeout=TIMEOUT)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        reason, _, retry = details_of(raised.value)
        assert reason == "QUEUE_FULL"
        assert retry is not None
        assert retry > 0
        engine.gate.set()
        await asyncio.gather(running, waiting)


async def test_a_cancelled_call_is_not_computed():
    engine, metrics = GatedEngine(), Metrics("reference")
    async with serving(engine, metrics) as stub:
        running = stub.ComputeLogprobs(ask([[1, 2]]), timeout=TIMEOUT)
        assert await asyncio.to_thread(engine.entered.acquire, timeout=TIMEOUT)
        waiting = stub.ComputeLogprobs(ask([[1, 2]] * 5), timeout=TIMEOUT)
        await until_queued(metrics, 5)
        waiting.cancel()
        async with asyncio.timeout(TIMEOUT):
            labels = {"method": "ComputeLogprobs"}
            while metrics.registry.get_sample_value("steersman_rpc_in_flight", labels) != 1:
                await asyncio.sleep(0.001)
        engine.gate.set()
        await running
        await stub.ComputeLogprobs(ask([[1, 2], [3, 4]]), timeout=TIMEOUT)
    assert engine.batches == [1, 2]


async def test_calls_of_several_callers_share_a_batch():
    engine, metrics = GatedEngine(), Metrics("reference")
    async with serving(engine, metrics) as stub:
        running = stub.ComputeLogprobs(ask([[1, 2]]), timeout=TIMEOUT)
        assert await asyncio.to_thread(engine.entered.acquire, timeout=TIMEOUT)
        others = [stub.ComputeLogprobs(ask([[1, 2]]), timeout=TIMEOUT) for _ in range(4)]
        await until_queued(metrics, 4)
        engine.gate.set()
        await asyncio.gather(running, *others)
    assert engine.batches == [1, 4]
