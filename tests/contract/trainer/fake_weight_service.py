"""A weight service that keeps the contract of weights.proto in a few lines, and breaks it when told to."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
import numpy as np

from steersman.v1 import types_pb2, weights_pb2, weights_pb2_grpc
from steersman.wire.convert import version_from_proto, version_to_proto
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.identity import WeightVersion
from steersman.wire.status import DETAILS_TRAILER, encode_details
from steersman.wire.tensors import item_bytes
from steersman.wire.weights.delta import apply_delta
from steersman.wire.weights.digest import WeightDigest, chunk_checksum
from steersman.wire.weights.manifest import Manifest


@dataclass
class FakeWeightService(weights_pb2_grpc.WeightServiceServicer):
    """One replica. `faults` maps a step ("push", "stage", "activate") to what goes wrong there, in order; `holds` to an
    event that it waits for there.
    """

    manifest: weights_pb2.WeightManifest
    events: list[str] = field(default_factory=list)
    faults: dict[str, list[SteersmanError]] = field(default_factory=dict)
    holds: dict[str, asyncio.Event] = field(default_factory=dict)
    active: WeightVersion = field(default_factory=WeightVersion)
    tensors: dict[str, bytes] = field(default_factory=dict)
    digest: bytes = b""
    staged: tuple[WeightVersion, bytes, dict[str, bytes]] | None = None
    pushing: WeightVersion | None = None
    max_chunk_bytes: int = 256
    largest_chunk: int = 0
    num_dense_chunks: int = 0
    num_delta_chunks: int = 0
    _staging: dict[str, bytearray] = field(default_factory=dict)
    _received: dict[str, int] = field(default_factory=dict)
    _takes_deltas: bool = False
    held_at: str = ""
    _noted: asyncio.Event = field(default_factory=asyncio.Event)

    async def GetWeightState(self, request, context):
        await self._fault("state", context)
        state = weights_pb2.GetWeightStateResponse(active=self._snapshot(self.active, self.digest))
        if request.include_manifest:
            state.manifest.CopyFrom(self.manifest)
        if self.staged is not None:
            state.staged.CopyFrom(self._snapshot(self.staged[0], self.staged[1]))
        return state

    async def BeginPush(self, request, context):
        version = version_from_proto(request.version)
        base = version_from_proto(request.base_version) if request.HasField("base_version") else None
        self.note(f"begin {version}" + (f" from {base}" if base is not None else ""))
        await self._fault("begin", context)
        if version == self.active:
            return weights_pb2.BeginPushResponse(already_active=True)
        if self.pushing is not None and self.pushing.run_id != version.run_id:
            await self._fail(SteersmanError(Reason.WEIGHT_PUSH_IN_PROGRESS, "another push holds the replica"), context)
        if version.is_stale_against(self.active):
            await self._fail(SteersmanError(Reason.WEIGHT_VERSION_STALE, "older than the active version"), context)
        assert request.manifest == self.manifest
        if base is not None and base != self.active:
            await self._fail(SteersmanError(Reason.WEIGHT_BASE_MISMATCH, f"active is {self.active}"), context)
        self.pushing, self.staged = version, None
        self._takes_deltas = base is not None
        self._staging = {
            spec.name: bytearray(int(np.prod(spec.shape)) * item_bytes(spec.dtype)) for spec in self.manifest.tensors
        }
        if base is not None:
            self._staging = {name: bytearray(data) for name, data in self.tensors.items()}
        self._received = dict.fromkeys(self._staging, 0)
        return weights_pb2.BeginPushResponse(push_id="p1", max_chunk_bytes=self.max_chunk_bytes)

    async def PushChunks(self, requests: AsyncIterator[weights_pb2.PushChunksRequest], context):
        num_chunks = total = 0
        async for request in requests:
            if not request.HasField("chunk"):
                continue
            chunk = request.chunk
            num_chunks += 1
            if num_chunks == 2:
                await self._fault("push", context)
            assert chunk_checksum(chunk.data) == chunk.checksum
            spec = self.manifest.tensors[chunk.tensor_index]
            size = item_bytes(spec.dtype)
            start, length = chunk.element_offset * size, chunk.num_elements * size
            span = np.frombuffer(self._staging[spec.name], np.uint8)[start : start + length]
            if chunk.encoding == weights_pb2.WEIGHT_ENCODING_SPARSE_DELTA:
                assert self._takes_deltas, "a delta without a base"
                apply_delta(chunk.data, span.view(f"<u{size}"))
                self.num_delta_chunks += 1
            else:
                span[:] = np.frombuffer(chunk.data, np.uint8)
                self.num_dense_chunks += 1
            self._received[spec.name] += length
            self.largest_chunk = max(self.largest_chunk, len(chunk.data))
            total += len(chunk.data)
        self.note("push")
        return weights_pb2.PushChunksResponse(received_bytes=total, num_chunks=num_chunks)

    async def Stage(self, request, context):
        self.note("stage")
        await self._fault("stage", context)
        assert self.pushing is not None
        assert {name: len(data) for name, data in self._staging.items()} == self._received
        digest = WeightDigest(Manifest.from_proto(self.manifest))
        for spec in self.manifest.tensors:
            digest.add(spec.name, bytes(self._staging[spec.name]))
        if digest.finish() != request.digest:
            self.pushing = None
            await self._fail(SteersmanError(Reason.WEIGHT_DIGEST_MISMATCH, "the digest differs"), context)
        self.staged = (self.pushing, request.digest, {name: bytes(data) for name, data in self._staging.items()})
        self.pushing = None
        self._noted.set()
        return weights_pb2.StageResponse(staged=self._snapshot(*self.staged[:2]))

    async def Activate(self, request, context):
        version = version_from_proto(request.version)
        self.note(f"activate {version}")
        await self._fault("activate", context)
        if version != self.active:
            assert self.staged is not None
            assert self.staged[0] == version
            self.active, self.digest, self.tensors = self.staged
            self.staged = None
            self._noted.set()
        return weights_pb2.ActivateResponse(active=self._snapshot(self.active, self.digest))

    async def AbortPush(self, request, context):
        self.note("abort")
        self.pushing = self.staged = None
        return weights_pb2.AbortPushResponse()

    def restart(self) -> None:
        """Forgets everything, as a new process would."""
        self.active, self.digest, self.tensors, self.staged, self.pushing = WeightVersion(), b"", {}, None, None
        self.note("restart")

    def note(self, event: str) -> None:
        """Adds an event and wakes who waits for it."""
        self.events.append(event)
        self._noted.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until this holds; looks again after each event."""
        while not condition():
            self._noted.clear()
            await self._noted.wait()

    def hold(self, step: str) -> asyncio.Event:
        """Makes `step` wait for the event that is returned."""
        self.holds[step] = asyncio.Event()
        return self.holds[step]

    def release(self) -> None:
        """Ends all holds."""
        for event in self.holds.values():
            event.set()

    async def _fault(self, step: str, context: grpc.aio.ServicerContext) -> None:
        if step in self.holds:
            self.held_at = step
            self._noted.set()
            await self.holds[step].wait()
            self.held_at = ""
        if self.faults.get(step):
            await self._fail(self.faults[step].pop(0), context)

    async def _fail(self, error: SteersmanError, context: grpc.aio.ServicerContext) -> None:
        if error.reason is Reason.WEIGHT_PUSH_NOT_ACTIVE:
            self.pushing = None
        trailer = ((DETAILS_TRAILER, encode_details(error)),)
        code = next(code for code in grpc.StatusCode if code.value[0] == int(error.code))
        await context.abort(code, error.message, trailer)

    @staticmethod
    def _snapshot(version: WeightVersion, digest: bytes) -> weights_pb2.WeightSnapshot:
        return weights_pb2.WeightSnapshot(version=version_to_proto(version), digest=digest)


class Replica:
    """A fake weight service behind a real server."""

    def __init__(self, service: FakeWeightService) -> None:
        self.service = service
        self.port = 0
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server()
        weights_pb2_grpc.add_WeightServiceServicer_to_server(self.service, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        assert self._server is not None
        await self._server.stop(None)
        await asyncio.sleep(0)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"


def manifest(specs: dict[str, tuple[tuple[int, ...], str]]) -> weights_pb2.WeightManifest:
    """A manifest in ascending order of name."""
    message = weights_pb2.WeightManifest()
    for name, (shape, dtype) in sorted(specs.items()):
        message.tensors.add(name=name, shape=shape, dtype=types_pb2.DataType.Value(f"DATA_TYPE_{dtype}"))
    return message
