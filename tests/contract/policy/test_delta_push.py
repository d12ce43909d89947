"""Sparse deltas over a real grpc.aio server, with a fake engine."""

import dataclasses
from collections.abc import AsyncIterator

import grpc
import pytest
from delta_fakes import MANIFEST, DeltaSource, contract_digest, deltas, dense, host_bytes, start, stepped
from policy_fakes import FakeEngine

from steersman.policy.app import PolicyService
from steersman.policy.settings import PolicySettings
from steersman.serving.metrics import Metrics
from steersman.serving.server import start_server
from steersman.v1 import types_pb2, weights_pb2, weights_pb2_grpc
from steersman.wire.errors import Reason
from steersman.wire.status import DETAILS_TRAILER, decode_error
from steersman.wire.weights.digest import chunk_checksum
from steersman.wire.weights.messages import Chunk

TIMEOUT_S = 20
BASE = start()
NEW = stepped(BASE, 1)
INITIAL = types_pb2.WeightVersion()


class Replica:
    """A running server as a pusher sees it, and the fake engine behind it."""

    def __init__(self, stub: weights_pb2_grpc.WeightServiceStub, engine: FakeEngine) -> None:
        self.stub, self.engine = stub, engine

    async def begin(self, step: int, base: types_pb2.WeightVersion | None) -> str:
        version = types_pb2.WeightVersion(run_id="run", step=step)
        request = weights_pb2.BeginPushRequest(version=version, base_version=base, manifest=MANIFEST.to_proto())
        response = await self.stub.BeginPush(request, timeout=TIMEOUT_S)
        return str(response.push_id)

    async def send(self, push_id: str, chunks: list[Chunk]) -> None:
        messages = [
            weights_pb2.PushChunksRequest(
                push_id=push_id,
                chunk=weights_pb2.WeightChunk(
                    tensor_index=chunk.tensor_index,
                    element_offset=chunk.element_offset,
                    num_elements=chunk.num_elements,
                    encoding=chunk.encoding,  # type: ignore[arg-type]
                    data=chunk.data,
                    checksum=chunk.checksum,
                ),
            )
            for chunk in chunks
        ]
        await self.stub.PushChunks(messages, timeout=TIMEOUT_S)

    async def activate(self, push_id: str, step: int, digest: bytes) -> None:
        request = weights_pb2.StageRequest(push_id=push_id, digest=digest)
        await self.stub.Stage(request, timeout=TIMEOUT_S)
        version = types_pb2.WeightVersion(run_id="run", step=step)
        await self.stub.Activate(weights_pb2.ActivateRequest(version=version), timeout=TIMEOUT_S)

    async def active(self) -> weights_pb2.WeightSnapshot:
        state = await self.stub.GetWeightState(weights_pb2.GetWeightStateRequest(), timeout=TIMEOUT_S)
        return state.active


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    settings = PolicySettings(model="unused", port=0, metrics_port=None)
    engine, metrics = FakeEngine(), Metrics("policy")
    server = await start_server(PolicyService(engine, DeltaSource(), settings, metrics), settings, metrics)
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield Replica(weights_pb2_grpc.WeightServiceStub(channel), engine)
    await server.stop()


def reason(error: grpc.aio.AioRpcError) -> Reason | None:
    trailers = dict(error.trailing_metadata() or ())
    return decode_error(error.code().value[0], error.details() or "", trailers.get(DETAILS_TRAILER)).reason


async def test_a_delta_push_is_a_dense_push_bit_for_bit(replica: Replica) -> None:
    push_id = await replica.begin(1, INITIAL)
    await replica.send(push_id, deltas(BASE, NEW))
    await replica.activate(push_id, 1, contract_digest(NEW))
    by_deltas = replica.engine.loaded
    push_id = await replica.begin(2, None)
    await replica.send(push_id, dense(NEW))
    await replica.activate(push_id, 2, contract_digest(NEW))
    assert by_deltas == replica.engine.loaded == host_bytes(NEW)


async def test_a_delta_against_a_version_that_is_not_active_is_refused(replica: Replica) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await replica.begin(2, types_pb2.WeightVersion(run_id="run", step=1))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason(caught.value) is Reason.WEIGHT_BASE_MISMATCH


def broken(kind: str) -> list[Chunk]:
    """The chunks of `NEW` with the first, a delta, spoilt."""
    first, *others = deltas(BASE, NEW)
    if kind == "malformed":
        data = first.data[:-3]
        return [dataclasses.replace(first, data=data, checksum=chunk_checksum(data)), *others]
    if kind == "flipped":
        return [dataclasses.replace(first, data=first.data[:-1] + bytes([first.data[-1] ^ 4])), *others]
    if kind == "unknown":
        return [dataclasses.replace(first, encoding=77), *others]
    return [first, first, *others]


@pytest.mark.parametrize("kind", ["malformed", "flipped", "unknown", "doubled"])
async def test_a_bad_delta_is_refused_and_the_old_weights_serve(replica: Replica, kind: str) -> None:
    before = await replica.active()
    push_id = await replica.begin(1, INITIAL)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await replica.send(push_id, broken(kind))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason(caught.value) is Reason.WEIGHT_CHUNK_INVALID
    assert await replica.active() == before
    assert before.digest == contract_digest(BASE)
    push_id = await replica.begin(1, INITIAL)
    await replica.send(push_id, deltas(BASE, NEW))
    await replica.activate(push_id, 1, contract_digest(NEW))
    assert replica.engine.loaded == host_bytes(NEW)
