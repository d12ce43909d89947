"""The processes of the `push` benchmark: python -m benchmarks.push_sides replica|sink MIB

                                          python -m benchmarks.push_sides trainer MIB PAIRS REPLICA PID SINK

Each writes one line of JSON: where it listens, or what it measured. All end by being killed, or at the end of a time.
"""

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import psutil

from benchmarks.push import status_mib
from steersman.client import AsyncWeightClient
from steersman.client.types import PushReceipt, RelayHop, WeightChunk, WeightSnapshot
from steersman.policy.engine.port import (
    Activation,
    GenerationRequest,
    HostWeights,
    KvCachePolicy,
    ModelFacts,
    SampleDelta,
)
from steersman.policy.weights.manifest import HostManifest, TensorSpec
from steersman.policy.weights.memory import HostCopy
from steersman.wire.allocator import keep_freed_memory
from steersman.wire.identity import ModelInfo, WeightVersion
from steersman.wire.limits import MIB

_LIFE_S: Final = 600.0
_TENSOR_MIB: Final = 32
_PIECE_BYTES: Final = MIB


def manifest_of(size_mib: int) -> HostManifest:
    """bfloat16 tensors of 32 MiB, as many as make `size_mib`."""
    shape = (_TENSOR_MIB * MIB // 2 // 4096, 4096)
    names = [f"layers.{index:04}.weight" for index in range(size_mib // _TENSOR_MIB)]
    return HostManifest.of(TensorSpec(name=name, shape=shape, dtype="bfloat16") for name in names)


class _NoEngine:
    """Generates nothing, and takes weights at once."""

    facts = ModelFacts(
        info=ModelInfo(name="none", vocab_size=1, max_sequence_tokens=1, eos_token_ids=()),
        has_tokenizer=False,
        has_chat_template=False,
    )
    num_unfinished = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[SampleDelta, None]:
        raise NotImplementedError
        yield

    def encode_text(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        raise NotImplementedError

    def check_health(self) -> None:
        return None

    async def stage(self, weights: HostWeights) -> None:
        return None

    async def discard_staged(self) -> None:
        return None

    async def activate(self, version: WeightVersion, weights: HostWeights, kv_cache: KvCachePolicy) -> Activation:
        return Activation(pause_s=0.0, num_running_requests=0)

    async def rollback(self, version: WeightVersion, weights: HostWeights, kv_cache: KvCachePolicy) -> Activation:
        return Activation(pause_s=0.0, num_running_requests=0)

    async def shutdown(self) -> None:
        return None


class _NoWeights:
    """Zeros."""

    def __init__(self, manifest: HostManifest) -> None:
        self.manifest = manifest

    def read_into(self, copy: memoryview) -> None:
        np.frombuffer(copy, np.uint8)[:] = 0


async def replica(size_mib: int) -> None:
    """The policy server without an engine."""
    from steersman.policy.app import PolicyService
    from steersman.policy.settings import PolicySettings
    from steersman.serving.metrics import Metrics
    from steersman.serving.server import start_server

    settings = PolicySettings.model_validate({"model": "none", "port": 0, "metrics_port": None})
    metrics = Metrics("policy")
    service = PolicyService(_NoEngine(), _NoWeights(manifest_of(size_mib)), settings, metrics)
    server = await start_server(service, settings, metrics)
    _tell(address=server.address, resident_mib=status_mib(os.getpid(), "VmRSS"))
    await asyncio.sleep(_LIFE_S)


def sink(size_mib: int) -> None:
    """Fills shared memory from one connection, over and over: a byte to begin with, the bytes, a byte for an answer."""
    copy = HostCopy(manifest_of(size_mib)).bytes
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(_LIFE_S)
        _tell(address=f"127.0.0.1:{listener.getsockname()[1]}")
        connection, _ = listener.accept()
    with connection:
        while connection.recv(1):
            done = 0
            while done < len(copy):
                count = connection.recv_into(copy[done : done + _PIECE_BYTES])
                if not count:
                    return
                done += count
            connection.sendall(b"!")


class _Timed(AsyncWeightClient):
    """Notes how long its last stream and its last staging took, and the processor time of both sides of the stream."""

    replica: psutil.Process
    cpu_s = (0.0, 0.0)
    stream_s = 0.0
    stage_s = 0.0

    async def push(
        self,
        push_id: str,
        chunks: AsyncIterable[WeightChunk] | Iterable[WeightChunk],
        *,
        relay: Sequence[RelayHop] = (),
        timeout: float | None = None,
    ) -> PushReceipt:
        started, own_s, other_s = time.perf_counter(), time.process_time(), _cpu_s(self.replica)
        receipt = await super().push(push_id, chunks, relay=relay, timeout=timeout)
        self.stream_s = time.perf_counter() - started
        self.cpu_s = time.process_time() - own_s, _cpu_s(self.replica) - other_s
        return receipt

    async def stage(self, push_id: str, digest: bytes, *, timeout: float | None = None) -> WeightSnapshot:
        started = time.perf_counter()
        snapshot = await super().stage(push_id, digest, timeout=timeout)
        self.stage_s = time.perf_counter() - started
        return snapshot


async def trainer(size_mib: int, num_pairs: int, replica_address: str, replica_pid: int, sink_address: str) -> None:
    """Sends by socket and pushes by publisher, in turn, the same weights."""
    import torch

    from steersman.trainer.weights.encode import PushEncoding
    from steersman.trainer.weights.image import WeightImage
    from steersman.trainer.weights.publisher import Publisher
    from steersman.trainer.weights.settings import PublishSettings

    block = torch.frombuffer(bytearray(os.urandom(MIB)), dtype=torch.bfloat16)
    tensors = {
        spec.name: block.repeat(spec.nbytes // MIB).reshape(spec.shape) for spec in manifest_of(size_mib).tensors
    }
    views = [tensor.view(torch.uint8).reshape(-1).numpy().data for tensor in tensors.values()]
    client = _Timed(replica_address)
    client.replica = psutil.Process(replica_pid)
    publisher = Publisher(
        lambda target: client,
        run_id="bench",
        targets=[replica_address],
        settings=PublishSettings(encoding=PushEncoding.DENSE),
    )
    host, _, port = sink_address.rpartition(":")
    names = ("raw_s", "stream_s", "publish_s", "stage_s", "trainer_cpu_s", "replica_cpu_s")
    measured: dict[str, list[float]] = {name: [] for name in names}
    resident = status_mib(os.getpid(), "VmRSS")
    with socket.create_connection((host, int(port))) as connection:
        for step in range(num_pairs + 1):
            raw_s = await asyncio.to_thread(_send, connection, views)
            image = WeightImage(WeightVersion(run_id="bench", step=step), tensors)
            report = await publisher.publish(image)
            if report.failures or report.pushed_bytes != size_mib * MIB:
                raise RuntimeError(f"pushed {report.pushed_bytes} bytes: {report.failures}")
            if step:  # the first is for the allocator, the connection and the window
                found = (raw_s, client.stream_s, report.seconds, client.stage_s, *client.cpu_s)
                for values, value in zip(measured.values(), found, strict=True):
                    values.append(value)
    high_water = status_mib(os.getpid(), "VmHWM")
    await publisher.close()
    _tell(**measured, resident_mib=resident, high_water_mib=high_water)


def _send(connection: socket.socket, views: Sequence[memoryview]) -> float:
    started = time.perf_counter()
    connection.sendall(b"?")
    for view in views:
        for start in range(0, len(view), _PIECE_BYTES):
            connection.sendall(view[start : start + _PIECE_BYTES])
    if connection.recv(1) != b"!":
        raise RuntimeError("the sink did not answer")
    return time.perf_counter() - started


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _tell(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def main(role: str, size_mib: str, *arguments: str) -> None:
    """Runs one side."""
    keep_freed_memory()
    if role == "replica":
        asyncio.run(replica(int(size_mib)))
    elif role == "sink":
        sink(int(size_mib))
    else:
        num_pairs, replica_address, replica_pid, sink_address = arguments
        asyncio.run(trainer(int(size_mib), int(num_pairs), replica_address, int(replica_pid), sink_address))


if __name__ == "__main__":
    main(*sys.argv[1:])
