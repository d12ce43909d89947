"""Clients of the weight service: the push transaction of one replica, step by step.

    begin -> push (one or more streams) -> stage -> activate -> (rollback)

Until `activate` succeeds the old weights serve. What to push, in which chunks and to which replicas is the
publisher's business; these are thin.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from datetime import UTC, timedelta
from typing import Any, Final

import grpc
import grpc.aio

from steersman.client.calls import AsyncClient, Client, call_metadata, translated
from steersman.client.streams import Remembering, each
from steersman.client.types import (
    Activation,
    KvCachePolicy,
    Push,
    PushReceipt,
    RelayHop,
    RelayReceipt,
    TensorSpec,
    WeightChunk,
    WeightEncoding,
    WeightSnapshot,
    WeightState,
)
from steersman.v1 import weights_pb2, weights_pb2_grpc
from steersman.wire.convert import version_from_proto, version_to_proto
from steersman.wire.endings import Endings
from steersman.wire.errors import SteersmanError
from steersman.wire.identity import WeightVersion
from steersman.wire.status import status_from_proto
from steersman.wire.tensors import dtype_from_name, dtype_name
from steersman.wire.weights.messages import PUSH_CHUNKS, Chunk, encode_chunk

_ENCODING: Final = {
    WeightEncoding.DENSE: weights_pb2.WEIGHT_ENCODING_DENSE,
    WeightEncoding.SPARSE_DELTA: weights_pb2.WEIGHT_ENCODING_SPARSE_DELTA,
}
_KV_CACHE: Final = {
    KvCachePolicy.SERVER_DEFAULT: weights_pb2.KV_CACHE_POLICY_UNSPECIFIED,
    KvCachePolicy.KEEP: weights_pb2.KV_CACHE_POLICY_KEEP,
    KvCachePolicy.RECOMPUTE: weights_pb2.KV_CACHE_POLICY_RECOMPUTE,
}
# Staging hashes all weights, activation waits for the engine: both may take long on large models.
_TRANSACTION_TIMEOUT: Final = 600.0


def _snapshot(message: weights_pb2.WeightSnapshot) -> WeightSnapshot:
    time = message.activate_time.ToDatetime(tzinfo=UTC) if message.HasField("activate_time") else None
    return WeightSnapshot(version=version_from_proto(message.version), digest=message.digest, activate_time=time)


def state_from_proto(message: weights_pb2.GetWeightStateResponse) -> WeightState:
    """The state of a replica's weights."""
    return WeightState(
        active=_snapshot(message.active),
        staged=_snapshot(message.staged) if message.HasField("staged") else None,
        previous=_snapshot(message.previous) if message.HasField("previous") else None,
        pushing=version_from_proto(message.pushing) if message.HasField("pushing") else None,
        manifest=tuple(
            TensorSpec(name=spec.name, shape=tuple(spec.shape), dtype=dtype_name(spec.dtype))
            for spec in message.manifest.tensors
        ),
        total_bytes=message.total_bytes,
    )


def begin_request(
    version: WeightVersion,
    manifest: Sequence[TensorSpec],
    base_version: WeightVersion | None,
    partial: bool,
    idle_timeout_seconds: float,
    digest: bytes = b"",
) -> weights_pb2.BeginPushRequest:
    """The request that opens a push."""
    request = weights_pb2.BeginPushRequest(version=version_to_proto(version), partial=partial, digest=digest)
    if base_version is not None:
        request.base_version.CopyFrom(version_to_proto(base_version))
    for spec in manifest:
        request.manifest.tensors.add(name=spec.name, shape=spec.shape, dtype=dtype_from_name(spec.dtype))
    request.idle_timeout.FromTimedelta(timedelta(seconds=idle_timeout_seconds))
    return request


class _Stub(weights_pb2_grpc.WeightServiceStub):
    """The generated stub, but that PushChunks takes messages which are serialised already."""

    def __init__(self, channel: Any) -> None:
        super().__init__(channel)  # type: ignore[no-untyped-call]
        self.PushChunks: Any = channel.stream_unary(
            PUSH_CHUNKS, response_deserializer=weights_pb2.PushChunksResponse.FromString
        )


def chunk_request(chunk: WeightChunk) -> bytes:
    """One message of a chunk stream, after the first."""
    return encode_chunk(
        Chunk(
            tensor_index=chunk.tensor_index,
            element_offset=chunk.element_offset,
            num_elements=chunk.num_elements,
            encoding=_ENCODING[chunk.encoding],
            data=chunk.data,
            checksum=chunk.checksum,
        )
    )


def _first_of(push_id: str, relay: Sequence[RelayHop]) -> bytes:
    """The first message of a chunk stream: without a chunk, so that all with one can be passed on as they are."""
    return weights_pb2.PushChunksRequest(push_id=push_id, relay=_hops(relay)).SerializeToString()


def _requests(push_id: str, relay: Sequence[RelayHop], chunks: Iterable[WeightChunk]) -> Iterator[bytes]:
    yield _first_of(push_id, relay)
    for chunk in chunks:
        yield chunk_request(chunk)


async def _requests_async(
    push_id: str, relay: Sequence[RelayHop], chunks: AsyncIterable[WeightChunk] | Iterable[WeightChunk]
) -> AsyncIterator[bytes]:
    yield _first_of(push_id, relay)
    async for chunk in each(chunks):
        yield chunk_request(chunk)


def _hops(hops: Sequence[RelayHop]) -> list[weights_pb2.RelayHop]:
    return [weights_pb2.RelayHop(target=hop.target, push_id=hop.push_id, next=_hops(hop.next)) for hop in hops]


def _push(message: weights_pb2.BeginPushResponse) -> Push:
    return Push(push_id=message.push_id, max_chunk_bytes=message.max_chunk_bytes, already_active=message.already_active)


def _receipt(message: weights_pb2.PushChunksResponse) -> PushReceipt:
    relayed = (
        RelayReceipt(
            target=receipt.target,
            error=status_from_proto(receipt.status),
            received_bytes=receipt.received_bytes,
            num_chunks=receipt.num_chunks,
        )
        for receipt in message.relayed
    )
    return PushReceipt(received_bytes=message.received_bytes, num_chunks=message.num_chunks, relayed=tuple(relayed))


def _activation(message: weights_pb2.ActivateResponse) -> Activation:
    return Activation(
        active=_snapshot(message.active),
        pause_seconds=message.pause.ToTimedelta().total_seconds(),
        num_running_requests=message.num_running_requests,
    )


def _rolled_back(message: weights_pb2.RollbackResponse) -> Activation:
    pause = message.pause.ToTimedelta().total_seconds()
    return Activation(active=_snapshot(message.active), pause_seconds=pause)


class AsyncWeightClient(AsyncClient):
    """Asyncio client of the weight service of one replica. Calls have 600 s unless `timeout` says otherwise."""

    default_timeout = _TRANSACTION_TIMEOUT
    _stub_type = _Stub

    async def state(self, *, include_manifest: bool = False, timeout: float | None = 30.0) -> WeightState:
        """What the replica serves; the manifest is empty unless asked for."""
        request = weights_pb2.GetWeightStateRequest(include_manifest=include_manifest)
        return state_from_proto(await self._call(self._stub.GetWeightState, request, timeout))

    async def begin(
        self,
        version: WeightVersion,
        manifest: Sequence[TensorSpec],
        *,
        base_version: WeightVersion | None = None,
        partial: bool = False,
        digest: bytes = b"",
        idle_timeout_seconds: float = 60.0,
        timeout: float | None = None,
    ) -> Push:
        """Opens a push. `manifest` lists all tensors in ascending order of name; the rest as in BeginPushRequest. With
        `digest`, of the weights that the version will have, WEIGHT_VERSION_STALE tells of other ones under its name.
        """
        request = begin_request(version, manifest, base_version, partial, idle_timeout_seconds, digest)
        return _push(await self._call(self._stub.BeginPush, request, timeout))

    async def push(
        self,
        push_id: str,
        chunks: AsyncIterable[WeightChunk] | Iterable[WeightChunk],
        *,
        relay: Sequence[RelayHop] = (),
        timeout: float | None = None,
    ) -> PushReceipt:
        """Sends chunks as one stream and waits until the replica has them all. Flow control is gRPC's.

        `relay`: replicas that it passes them on to; what became of those stands in the receipt, not in an error.
        An error that `chunks` raises cancels the stream and comes out of here unchanged.
        """
        metadata = call_metadata()
        call = self._stub.PushChunks(timeout=self._deadline(timeout).remaining(), metadata=metadata)
        ends = Endings(call)
        try:
            async for request in _requests_async(push_id, relay, chunks):
                try:
                    await call.write(request)
                except (asyncio.InvalidStateError, grpc.RpcError):
                    break  # the server ended the call; awaiting it tells why
            else:
                with translated(self.target, metadata), contextlib.suppress(asyncio.InvalidStateError):
                    await call.done_writing()
            with translated(self.target, metadata), ends.told():
                return _receipt(await call)
        finally:
            call.cancel()

    async def stage(self, push_id: str, digest: bytes, *, timeout: float | None = None) -> WeightSnapshot:
        """Has the replica verify the complete weights against their XXH3-128 digest and keep them ready."""
        request = weights_pb2.StageRequest(push_id=push_id, digest=digest)
        return _snapshot((await self._call(self._stub.Stage, request, timeout)).staged)

    async def activate(
        self,
        version: WeightVersion,
        *,
        kv_cache: KvCachePolicy = KvCachePolicy.SERVER_DEFAULT,
        timeout: float | None = None,
    ) -> Activation:
        """Switches to the staged weights without aborting a request. Activating what is active succeeds."""
        request = weights_pb2.ActivateRequest(version=version_to_proto(version), kv_cache_policy=_KV_CACHE[kv_cache])
        return _activation(await self._call(self._stub.Activate, request, timeout))

    async def rollback(
        self,
        version: WeightVersion,
        *,
        kv_cache: KvCachePolicy = KvCachePolicy.SERVER_DEFAULT,
        timeout: float | None = None,
    ) -> Activation:
        """Switches back to `version`, which must be the previous one."""
        request = weights_pb2.RollbackRequest(version=version_to_proto(version), kv_cache_policy=_KV_CACHE[kv_cache])
        return _rolled_back(await self._call(self._stub.Rollback, request, timeout))

    async def abort(self, push_id: str, *, timeout: float | None = 30.0) -> None:
        """Gives up a push; the old weights serve on."""
        await self._call(self._stub.AbortPush, weights_pb2.AbortPushRequest(push_id=push_id), timeout)


class WeightClient(Client):
    """Blocking client of the weight service of one replica. Calls have 600 s unless `timeout` says otherwise."""

    default_timeout = _TRANSACTION_TIMEOUT
    _stub_type = _Stub

    def state(self, *, include_manifest: bool = False, timeout: float | None = 30.0) -> WeightState:
        """What the replica serves; the manifest is empty unless asked for."""
        request = weights_pb2.GetWeightStateRequest(include_manifest=include_manifest)
        return state_from_proto(self._call(self._stub.GetWeightState, request, timeout))

    def begin(
        self,
        version: WeightVersion,
        manifest: Sequence[TensorSpec],
        *,
        base_version: WeightVersion | None = None,
        partial: bool = False,
        digest: bytes = b"",
        idle_timeout_seconds: float = 60.0,
        timeout: float | None = None,
    ) -> Push:
        """Opens a push; as `AsyncWeightClient.begin`."""
        request = begin_request(version, manifest, base_version, partial, idle_timeout_seconds, digest)
        return _push(self._call(self._stub.BeginPush, request, timeout))

    def push(
        self,
        push_id: str,
        chunks: Iterable[WeightChunk],
        *,
        relay: Sequence[RelayHop] = (),
        timeout: float | None = None,
    ) -> PushReceipt:
        """Sends chunks as one stream; as `AsyncWeightClient.push`. `chunks` is consumed in another thread."""
        metadata, requests = call_metadata(), Remembering(_requests(push_id, relay, chunks))
        try:
            with translated(self.target, metadata):
                remaining = self._deadline(timeout).remaining()
                return _receipt(self._stub.PushChunks(requests, timeout=remaining, metadata=metadata))
        except SteersmanError:
            requests.raise_error()
            raise

    def stage(self, push_id: str, digest: bytes, *, timeout: float | None = None) -> WeightSnapshot:
        """Has the replica verify the complete weights against their XXH3-128 digest and keep them ready."""
        request = weights_pb2.StageRequest(push_id=push_id, digest=digest)
        return _snapshot(self._call(self._stub.Stage, request, timeout).staged)

    def activate(
        self,
        version: WeightVersion,
        *,
        kv_cache: KvCachePolicy = KvCachePolicy.SERVER_DEFAULT,
        timeout: float | None = None,
    ) -> Activation:
        """Switches to the staged weights without aborting a request. Activating what is active succeeds."""
        request = weights_pb2.ActivateRequest(version=version_to_proto(version), kv_cache_policy=_KV_CACHE[kv_cache])
        return _activation(self._call(self._stub.Activate, request, timeout))

    def rollback(
        self,
        version: WeightVersion,
        *,
        kv_cache: KvCachePolicy = KvCachePolicy.SERVER_DEFAULT,
        timeout: float | None = None,
    ) -> Activation:
        """Switches back to `version`, which must be the previous one."""
        request = weights_pb2.RollbackRequest(version=version_to_proto(version), kv_cache_policy=_KV_CACHE[kv_cache])
        return _rolled_back(self._call(self._stub.Rollback, request, timeout))

    def abort(self, push_id: str, *, timeout: float | None = 30.0) -> None:
        """Gives up a push; the old weights serve on."""
        self._call(self._stub.AbortPush, weights_pb2.AbortPushRequest(push_id=push_id), timeout)
