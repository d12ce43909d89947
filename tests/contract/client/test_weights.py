"""The weight client against a server: the transaction, chunk streams, and errors on either side of a stream."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from steersman.client import (
    AsyncWeightClient,
    KvCachePolicy,
    RelayHop,
    RelayReceipt,
    TensorSpec,
    WeightChunk,
    WeightClient,
    WeightVersion,
)
from steersman.v1 import types_pb2, weights_pb2, weights_pb2_grpc
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.status import status_to_proto

ADD = weights_pb2_grpc.add_WeightServiceServicer_to_server
VERSION = WeightVersion(run_id="run", step=2)
MANIFEST = [TensorSpec(name="a.weight", shape=(2, 3), dtype="bfloat16")]


def chunk(offset: int) -> WeightChunk:
    return WeightChunk(tensor_index=0, element_offset=offset, num_elements=3, data=b"\x01" * 6, checksum=2**64 - 1)


class FakeWeights(weights_pb2_grpc.WeightServiceServicer):
    def __init__(self, refuse: Any) -> None:
        self.refuse = refuse
        self.messages: list[weights_pb2.PushChunksRequest] = []
        self.calls: list[Any] = []
        self.refuse_after: int | None = None
        self.relayed: list[weights_pb2.RelayReceipt] = []
        self.stream_ended = asyncio.Event()

    def snapshot(self) -> weights_pb2.WeightSnapshot:
        version = types_pb2.WeightVersion(run_id="run", step=2)
        return weights_pb2.WeightSnapshot(version=version, digest=b"d" * 16)

    async def GetWeightState(self, request: Any, context: Any) -> weights_pb2.GetWeightStateResponse:
        response = weights_pb2.GetWeightStateResponse(active=self.snapshot(), total_bytes=12)
        if request.include_manifest:
            response.manifest.tensors.add(name="a.weight", shape=[2, 3], dtype=types_pb2.DATA_TYPE_BFLOAT16)
        return response

    async def BeginPush(self, request: weights_pb2.BeginPushRequest, context: Any) -> weights_pb2.BeginPushResponse:
        self.calls.append(request)
        return weights_pb2.BeginPushResponse(push_id="push-1", max_chunk_bytes=1024)

    async def PushChunks(self, requests: Any, context: Any) -> weights_pb2.PushChunksResponse:
        try:
            async for message in requests:
                self.messages.append(message)
                if len(self.messages) == self.refuse_after:
                    await self.refuse(context, SteersmanError(Reason.WEIGHT_CHUNK_INVALID, "chunk outside its tensor"))
            received = sum(len(message.chunk.data) for message in self.messages)
            return weights_pb2.PushChunksResponse(
                received_bytes=received, num_chunks=len(self.messages) - 1, relayed=self.relayed
            )
        finally:
            self.stream_ended.set()

    async def Stage(self, request: Any, context: Any) -> weights_pb2.StageResponse:
        if request.digest != b"d" * 16:
            await self.refuse(context, SteersmanError(Reason.WEIGHT_DIGEST_MISMATCH, "another digest"))
        return weights_pb2.StageResponse(staged=self.snapshot())

    async def Activate(self, request: weights_pb2.ActivateRequest, context: Any) -> weights_pb2.ActivateResponse:
        self.calls.append(request)
        response = weights_pb2.ActivateResponse(active=self.snapshot(), num_running_requests=3)
        response.pause.FromMilliseconds(31)
        return response

    async def Rollback(self, request: Any, context: Any) -> weights_pb2.RollbackResponse:
        return weights_pb2.RollbackResponse(active=self.snapshot())

    async def AbortPush(self, request: Any, context: Any) -> weights_pb2.AbortPushResponse:
        self.calls.append(request)
        return weights_pb2.AbortPushResponse()


@pytest.fixture
def fake(refuse: Any) -> FakeWeights:
    return FakeWeights(refuse)


async def test_a_whole_transaction(fake: FakeWeights, serve: Any) -> None:
    async with AsyncWeightClient(await serve(ADD, fake)) as client:
        assert (await client.state()).manifest == ()
        state = await client.state(include_manifest=True)
        assert state.manifest == tuple(MANIFEST)
        assert (state.staged, state.previous, state.pushing) == (None, None, None)
        base = WeightVersion(run_id="run", step=1)
        push = await client.begin(VERSION, MANIFEST, base_version=base, partial=True, digest=b"d" * 16)
        receipt = await client.push(push.push_id, [chunk(0), chunk(3)])
        assert (receipt.received_bytes, receipt.num_chunks) == (12, 2)
        assert (await client.stage(push.push_id, b"d" * 16)).version == VERSION
        activation = await client.activate(VERSION, kv_cache=KvCachePolicy.RECOMPUTE)
        assert activation.active.version == VERSION
        assert activation.pause_seconds == pytest.approx(0.031)
        assert activation.num_running_requests == 3
        assert (await client.rollback(VERSION)).active.digest == b"d" * 16
        await client.abort(push.push_id)
    begin, activate, abort = fake.calls
    assert begin.base_version.step == 1
    assert begin.partial
    assert begin.digest == b"d" * 16
    assert begin.idle_timeout.seconds == 60
    assert activate.kv_cache_policy == weights_pb2.KV_CACHE_POLICY_RECOMPUTE
    assert abort.push_id == "push-1"
    # What can be passed on as it is has nothing that is meant for one replica alone.
    assert [(message.push_id, message.HasField("chunk")) for message in fake.messages] == [
        ("push-1", False),
        ("", True),
        ("", True),
    ]
    assert fake.messages[1].chunk.checksum == 2**64 - 1


async def test_a_route_travels_ahead_of_the_chunks_and_its_receipts_come_back(fake: FakeWeights, serve: Any) -> None:
    gone = SteersmanError(Reason.DEADLINE_EXCEEDED, "b:2 held up the stream")
    fake.relayed = [
        weights_pb2.RelayReceipt(target="a:1", received_bytes=6, num_chunks=1),
        weights_pb2.RelayReceipt(target="b:2", status=status_to_proto(gone)),
    ]
    route = (RelayHop(target="a:1", push_id="pa", next=(RelayHop(target="b:2", push_id="pb"),)),)
    async with AsyncWeightClient(await serve(ADD, fake)) as client:
        receipt = await client.push("push-1", [chunk(0)], relay=route)
    [hop] = fake.messages[0].relay
    assert (hop.target, hop.push_id, [(each.target, each.push_id) for each in hop.next]) == (
        "a:1",
        "pa",
        [("b:2", "pb")],
    )
    assert not fake.messages[1].relay
    fine, failed = receipt.relayed
    assert fine == RelayReceipt(target="a:1", received_bytes=6, num_chunks=1)
    assert (failed.target, failed.received_bytes, failed.num_chunks) == ("b:2", 0, 0)
    assert failed.error is not None
    assert (failed.error.reason, failed.error.message) == (gone.reason, gone.message)


async def test_a_refused_chunk_ends_the_stream_with_its_reason(fake: FakeWeights, serve: Any) -> None:
    fake.refuse_after = 2
    produced = 0

    async def endless() -> Any:
        nonlocal produced
        while True:
            produced += 1
            yield chunk(0)
            await asyncio.sleep(0)

    async with AsyncWeightClient(await serve(ADD, fake)) as client, asyncio.timeout(30):
        with pytest.raises(SteersmanError) as caught:
            await client.push("push-1", endless())
    assert caught.value.reason is Reason.WEIGHT_CHUNK_INVALID
    assert produced > 0


async def test_an_error_of_the_source_comes_out_unchanged_and_cancels_the_stream(fake: FakeWeights, serve: Any) -> None:
    def broken() -> Iterator[WeightChunk]:
        yield chunk(0)
        raise RuntimeError("the tensor is gone")

    async with AsyncWeightClient(await serve(ADD, fake)) as client, asyncio.timeout(30):
        with pytest.raises(RuntimeError, match="the tensor is gone"):
            await client.push("push-1", broken())
        await fake.stream_ended.wait()


async def test_stage_reports_another_digest(fake: FakeWeights, serve: Any) -> None:
    async with AsyncWeightClient(await serve(ADD, fake)) as client:
        with pytest.raises(SteersmanError) as caught:
            await client.stage("push-1", b"x" * 16)
    assert caught.value.reason is Reason.WEIGHT_DIGEST_MISMATCH


async def test_the_blocking_client_does_the_same(fake: FakeWeights, serve: Any) -> None:
    address = await serve(ADD, fake)

    def broken() -> Iterator[WeightChunk]:
        yield chunk(0)
        raise RuntimeError("the tensor is gone")

    def talk() -> None:
        with WeightClient(address) as client:
            assert client.begin(VERSION, MANIFEST).max_chunk_bytes == 1024
            assert client.push("push-1", iter([chunk(0), chunk(3)])).num_chunks == 2
            assert client.stage("push-1", b"d" * 16).version == VERSION
            assert client.activate(VERSION).num_running_requests == 3
            assert client.rollback(VERSION).pause_seconds == 0.0
            assert client.state().total_bytes == 12
            client.abort("push-1")
            with pytest.raises(RuntimeError, match="the tensor is gone"):
                client.push("push-1", broken())
            fake.messages.clear()
            fake.refuse_after = 2
            with pytest.raises(SteersmanError) as caught:
                client.push("push-1", iter([chunk(0)] * 100))
            assert caught.value.reason is Reason.WEIGHT_CHUNK_INVALID

    await asyncio.to_thread(talk)
