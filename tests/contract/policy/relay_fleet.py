"""Weight servers in process, large enough for a stream to be broken in its middle, and ways to break it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from policy_fakes import FakeEngine

from steersman.policy.engine.port import KvCachePolicy
from steersman.policy.metrics import PolicyMetrics
from steersman.policy.weights.manifest import HostManifest, TensorSpec, digest
from steersman.policy.weights.relay import Relay, RelayRules
from steersman.policy.weights.service import WeightServicer, add_weight_servicer
from steersman.policy.weights.store import WeightSource, WeightStore
from steersman.serving.metrics import Metrics
from steersman.serving.server import RunningServer, start_server
from steersman.serving.settings import ServerSettings
from steersman.v1 import types_pb2, weights_pb2, weights_pb2_grpc
from steersman.wire.weights.digest import chunk_checksum

TIMEOUT_S = 60
CHUNK_ELEMENTS = 16 * 1024
NUM_CHUNKS = 288
"""Of 64 KiB: 18 MiB in all, more than a link with its queue and its window of 8 MiB holds."""
MANIFEST = HostManifest.of([TensorSpec(name="w", shape=(NUM_CHUNKS, CHUNK_ELEMENTS), dtype="float32")])


class Zeros:
    """Weights of start-up."""

    def __init__(self, manifest: HostManifest = MANIFEST) -> None:
        self.manifest = manifest

    def read_into(self, copy: memoryview) -> None:
        copy[:] = bytes(len(copy))


class Servicer(WeightServicer):
    """The real one, with a tap on the messages of its streams."""

    def __init__(self, store: WeightStore, metrics: PolicyMetrics, relay: Relay) -> None:
        super().__init__(store, metrics, relay)
        self.fault = Fault()

    async def PushChunks(self, request_iterator: Any, context: Any) -> weights_pb2.PushChunksResponse:
        return await super().PushChunks(self.fault.tap(request_iterator), context)


class Fault:
    """None: messages pass as they are, and `received` is set once there were `count`. Others strike the first stream
    only, or as many as `num_streams` says.
    """

    def __init__(self, count: int = 1, num_streams: int = 1) -> None:
        self.count = count
        self.received = asyncio.Event()
        self._num_streams = num_streams

    async def tap(self, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        number = 0
        self._num_streams -= 1
        is_struck = self._num_streams >= 0
        async for message in messages:
            number += 1
            if number == self.count and is_struck:
                self.received.set()
                message = await self.strike(message)
            yield message

    async def strike(self, raw: bytes) -> bytes:
        """What goes wrong at message number `count`."""
        return raw


class Stuck(Fault):
    """Reads no further."""

    async def strike(self, raw: bytes) -> bytes:
        await asyncio.Event().wait()
        return raw


class FlippedBit(Fault):
    """A chunk arrives with another bit than was sent."""

    async def strike(self, raw: bytes) -> bytes:
        message = weights_pb2.PushChunksRequest.FromString(raw)
        data = bytearray(message.chunk.data)
        data[len(data) // 2] ^= 4
        message.chunk.data = bytes(data)
        return message.SerializeToString()


@dataclass
class Node:
    """One replica."""

    server: RunningServer
    store: WeightStore
    engine: FakeEngine
    servicer: Servicer
    metrics: Metrics
    stub: weights_pb2_grpc.WeightServiceStub
    push_id: str = ""
    stopped: bool = False

    @property
    def target(self) -> str:
        return self.server.address

    @property
    def fault(self) -> Fault:
        """What goes wrong."""
        return self.servicer.fault

    async def begin(self, step: int = 1, base: types_pb2.WeightVersion | None = None) -> None:
        """Opens a push."""
        version = types_pb2.WeightVersion(run_id="run", step=step)
        manifest = self.store.manifest.to_proto()
        request = weights_pb2.BeginPushRequest(version=version, manifest=manifest, base_version=base)
        self.push_id = (await self.stub.BeginPush(request, timeout=TIMEOUT_S)).push_id

    async def finish(self, expected: bytes, step: int = 1) -> None:
        """Stages and activates."""
        request = weights_pb2.StageRequest(push_id=self.push_id, digest=expected)
        await self.stub.Stage(request, timeout=TIMEOUT_S)
        version = types_pb2.WeightVersion(run_id="run", step=step)
        await self.stub.Activate(weights_pb2.ActivateRequest(version=version), timeout=TIMEOUT_S)

    async def until_free(self) -> None:
        """Waits until no push is under way here."""
        async with asyncio.timeout(TIMEOUT_S):
            while self.store.pushing is not None:
                await asyncio.sleep(0)

    def hop(self, *behind: weights_pb2.RelayHop) -> weights_pb2.RelayHop:
        """This replica on a route."""
        return weights_pb2.RelayHop(target=self.target, push_id=self.push_id, next=behind)

    async def stop(self) -> None:
        """At once; again changes nothing."""
        if not self.stopped:
            self.stopped = True
            await self.server.stop()


class _Plane:
    name = "policy"

    def __init__(self, store: WeightStore, engine: FakeEngine, servicer: WeightServicer) -> None:
        self._store, self._engine, self._servicer = store, engine, servicer

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        add_weight_servicer(self._servicer, server)
        return ["steersman.v1.WeightService"]

    async def check_health(self) -> None:
        self._engine.check_health()

    async def drain(self) -> None: ...

    async def close(self) -> None:
        await self._servicer.close()
        await self._store.close()


@asynccontextmanager
async def fleet(
    num_nodes: int,
    *,
    faults: dict[int, Fault] | None = None,
    rules: RelayRules | None = None,
    source: WeightSource | None = None,
    are_open: bool = True,
    timeout_s: float = TIMEOUT_S,
) -> AsyncIterator[list[Node]]:
    """Replicas in ascending order of target, with open pushes or without, that give up a link after half a second.
    `faults` by number.
    """
    nodes: list[Node] = []
    channels = []
    try:
        for _ in range(num_nodes):
            engine, metrics = FakeEngine(), Metrics("policy")
            store = WeightStore(engine, source or Zeros(), KvCachePolicy.KEEP)
            servicer = Servicer(store, PolicyMetrics(metrics), Relay(rules or RelayRules(stall_seconds=0.5)))
            server = await start_server(_Plane(store, engine, servicer), ServerSettings(), metrics)
            channels.append(grpc.aio.insecure_channel(server.address))
            stub = weights_pb2_grpc.WeightServiceStub(channels[-1])
            nodes.append(Node(server=server, store=store, engine=engine, servicer=servicer, metrics=metrics, stub=stub))
        nodes.sort(key=lambda node: node.target)
        for number, fault in (faults or {}).items():
            nodes[number].servicer.fault = fault
        async with asyncio.timeout(timeout_s):
            for node in nodes if are_open else []:
                await node.begin()
            yield nodes
    finally:
        for channel in channels:
            await channel.close()
        for node in nodes:
            await node.stop()


def weights(seed: int = 1) -> bytes:
    """Of `MANIFEST`, as they lie in a host copy."""
    return np.random.default_rng(seed).bytes(MANIFEST.nbytes)


def digest_of(content: bytes) -> bytes:
    """What Stage expects of them."""
    return digest(MANIFEST, memoryview(content))


def messages(content: bytes) -> list[weights_pb2.PushChunksRequest]:
    """The chunks of `weights`."""
    size = CHUNK_ELEMENTS * 4
    found = []
    for number in range(NUM_CHUNKS):
        data = content[number * size : (number + 1) * size]
        chunk = weights_pb2.WeightChunk(
            tensor_index=0,
            element_offset=number * CHUNK_ELEMENTS,
            num_elements=CHUNK_ELEMENTS,
            encoding=weights_pb2.WEIGHT_ENCODING_DENSE,
            data=data,
            checksum=chunk_checksum(data),
        )
        found.append(weights_pb2.PushChunksRequest(chunk=chunk))
    return found


def header(first: Node, *behind: weights_pb2.RelayHop) -> weights_pb2.PushChunksRequest:
    """The first message of a stream."""
    return weights_pb2.PushChunksRequest(push_id=first.push_id, relay=behind)
