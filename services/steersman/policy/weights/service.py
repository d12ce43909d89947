"""WeightService: converts, calls the store, converts."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from steersman.policy.engine.port import KvCachePolicy
from steersman.policy.metrics import PolicyMetrics
from steersman.policy.weights.records import DEFAULT_IDLE_TIMEOUT_S, BeginRequest, Snapshot
from steersman.policy.weights.relay import Relay
from steersman.policy.weights.store import WeightStore
from steersman.v1 import weights_pb2, weights_pb2_grpc
from steersman.wire.convert import version_from_proto, version_to_proto
from steersman.wire.errors import invalid_field
from steersman.wire.limits import WEIGHT_CHUNK_BYTES
from steersman.wire.weights.manifest import Manifest
from steersman.wire.weights.messages import decode_message

Context = grpc.aio.ServicerContext[Any, Any]

_ENDING_S: Final = 0.002
"""When a connection breaks, grpc.aio first says that a stream has no more messages, and cancels its handler next."""

_KV_POLICIES: Final[dict[int, KvCachePolicy | None]] = {
    weights_pb2.KV_CACHE_POLICY_UNSPECIFIED: None,
    weights_pb2.KV_CACHE_POLICY_KEEP: KvCachePolicy.KEEP,
    weights_pb2.KV_CACHE_POLICY_RECOMPUTE: KvCachePolicy.RECOMPUTE,
}


class WeightServicer(weights_pb2_grpc.WeightServiceServicer):
    """The weight plane of one replica."""

    def __init__(self, store: WeightStore, metrics: PolicyMetrics, relay: Relay) -> None:
        self._store = store
        self._metrics = metrics
        self._relay = relay

    async def close(self) -> None:
        """Closes the connections to other replicas."""
        await self._relay.close()

    async def GetWeightState(  # noqa: N802
        self, request: weights_pb2.GetWeightStateRequest, context: Context
    ) -> weights_pb2.GetWeightStateResponse:
        """Active, staged and previous weights, and the push under way."""
        store = self._store
        return weights_pb2.GetWeightStateResponse(
            active=_snapshot(store.active),
            staged=_snapshot(store.staged),
            previous=_snapshot(store.previous),
            pushing=version_to_proto(store.pushing) if store.pushing else None,
            manifest=store.manifest.to_proto() if request.include_manifest else None,
            total_bytes=store.manifest.total_bytes,
        )

    async def BeginPush(  # noqa: N802
        self, request: weights_pb2.BeginPushRequest, context: Context
    ) -> weights_pb2.BeginPushResponse:
        """Opens a push."""
        push_id = await self._store.begin(_begin_request(request))
        return weights_pb2.BeginPushResponse(
            push_id=push_id or "", max_chunk_bytes=WEIGHT_CHUNK_BYTES, already_active=push_id is None
        )

    async def PushChunks(  # noqa: N802
        self, request_iterator: AsyncIterator[bytes], context: Context
    ) -> weights_pb2.PushChunksResponse:
        """Takes one stream of chunks, and passes it on. A sender that goes in mid-stream takes its push with it."""
        push_id, num_messages, num_bytes, num_chunks = "", 0, 0, 0
        try:
            async with self._relay.stream() as onward:
                async for raw in request_iterator:
                    message = decode_message(raw)
                    num_messages += 1
                    push_id = push_id or message.push_id
                    if message.push_id and message.push_id != push_id:
                        raise invalid_field("push_id", message.push_id, f"{push_id!r}, as on the first message")
                    if message.relay:
                        if num_messages > 1:
                            raise invalid_field("relay", f"on message {num_messages}", "the first message of a stream")
                        self._store.require_push(push_id)
                        onward.open(push_id, message.relay, timeout=context.time_remaining())
                    if message.chunk is not None:
                        await onward.forward(message)
                        await self._store.write(push_id, message.chunk)
                        num_bytes += len(message.chunk.data)
                        num_chunks += 1
                await asyncio.sleep(_ENDING_S)
                relayed = await onward.finish()
        except asyncio.CancelledError:
            self._store.sender_gone(push_id)
            raise
        self._metrics.received(num_bytes)
        self._metrics.relayed(onward.num_bytes, onward.num_lost)
        return weights_pb2.PushChunksResponse(received_bytes=num_bytes, num_chunks=num_chunks, relayed=relayed)

    async def Stage(  # noqa: N802
        self, request: weights_pb2.StageRequest, context: Context
    ) -> weights_pb2.StageResponse:
        """Verifies and prepares a push."""
        staged = await self._store.stage(request.push_id, request.digest)
        return weights_pb2.StageResponse(staged=_snapshot(staged))

    async def Activate(  # noqa: N802
        self, request: weights_pb2.ActivateRequest, context: Context
    ) -> weights_pb2.ActivateResponse:
        """Switches to the staged weights."""
        switch = await self._store.activate(version_from_proto(request.version), _kv_policy(request.kv_cache_policy))
        self._metrics.switched(switch)
        return weights_pb2.ActivateResponse(
            active=_snapshot(switch.active),
            pause=_duration(switch.pause_s),
            num_running_requests=switch.num_running_requests,
        )

    async def Rollback(  # noqa: N802
        self, request: weights_pb2.RollbackRequest, context: Context
    ) -> weights_pb2.RollbackResponse:
        """Switches to the weights before."""
        switch = await self._store.rollback(version_from_proto(request.version), _kv_policy(request.kv_cache_policy))
        self._metrics.switched(switch)
        return weights_pb2.RollbackResponse(active=_snapshot(switch.active), pause=_duration(switch.pause_s))

    async def AbortPush(  # noqa: N802
        self, request: weights_pb2.AbortPushRequest, context: Context
    ) -> weights_pb2.AbortPushResponse:
        """Gives up a push."""
        await self._store.abort(request.push_id)
        return weights_pb2.AbortPushResponse()


def add_weight_servicer(servicer: WeightServicer, server: grpc.aio.Server) -> None:
    """Adds the servicer to a server, so that chunks reach it as they came."""
    weights_pb2_grpc.add_WeightServiceServicer_to_server(servicer, server)
    undecoded = grpc.stream_unary_rpc_method_handler(
        servicer.PushChunks, response_serializer=weights_pb2.PushChunksResponse.SerializeToString
    )
    # In place of the generated handler, which would parse each message, and thereby copy it twice.
    service = weights_pb2.DESCRIPTOR.services_by_name["WeightService"].full_name
    registry: Any = server  # grpc-stubs do not know the method
    registry.add_registered_method_handlers(service, {"PushChunks": undecoded})


def _begin_request(request: weights_pb2.BeginPushRequest) -> BeginRequest:
    return BeginRequest(
        version=version_from_proto(request.version),
        tensors=Manifest.from_proto(request.manifest).tensors,
        base_version=version_from_proto(request.base_version) if request.HasField("base_version") else None,
        partial=request.partial,
        digest=request.digest,
        idle_timeout_s=_seconds(request.idle_timeout) if request.HasField("idle_timeout") else DEFAULT_IDLE_TIMEOUT_S,
    )


def _seconds(duration: Duration) -> float:
    # Not ToTimedelta: it overflows where the range check is still to come.
    return duration.seconds + duration.nanos / 1e9


def _kv_policy(value: int) -> KvCachePolicy | None:
    if value not in _KV_POLICIES:
        raise invalid_field("kv_cache_policy", value, "a KvCachePolicy")
    return _KV_POLICIES[value]


def _snapshot(snapshot: Snapshot | None) -> weights_pb2.WeightSnapshot | None:
    if snapshot is None:
        return None
    message = weights_pb2.WeightSnapshot(version=version_to_proto(snapshot.version), digest=snapshot.digest)
    if snapshot.activated_at is not None:
        message.activate_time.CopyFrom(_timestamp(snapshot.activated_at))
    return message


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(round(seconds * 1e9))
    return timestamp


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
