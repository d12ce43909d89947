"""The trainer of the `relay` benchmark: python -m benchmarks.relay_sides REPETITIONS CALIBRATE ADDRESS=PID...

Publishes to the replicas along several topologies and writes one line of JSON for each publication, then one with the
constants of a hop if asked for them. A process of its own, so that its sockets are the trainer's.
"""

import asyncio
import json
import os
import socket
import struct
import sys
import time
from collections.abc import AsyncIterable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from steersman.client import AsyncWeightClient
from steersman.client.types import PushReceipt, RelayHop, WeightChunk, WeightSnapshot
from steersman.trainer.weights.encode import PushEncoding
from steersman.trainer.weights.image import Manifest, WeightImage
from steersman.trainer.weights.publisher import Publisher
from steersman.trainer.weights.relay import RelayDelivery, RelaySettings
from steersman.trainer.weights.routes import Topology
from steersman.trainer.weights.settings import PublishSettings
from steersman.wire.allocator import keep_freed_memory
from steersman.wire.identity import WeightVersion

RUN: Final = "bench"
CHANGED_SHARE: Final = 0.035
"""Of the elements, as a step of AdamW at learning rate 3e-6 leaves them."""
# Offset of tcpi_bytes_acked in struct tcp_info of <linux/tcp.h>; it has been there since Linux 4.1.
_BYTES_ACKED_AT: Final = 120


def sent_bytes() -> int:
    """What this process has sent by the TCP sockets that it has now, and what was acknowledged: payload of TCP, so
    HTTP/2 and gRPC framing and every call are in it, headers of TCP and IP and retransmissions are not.
    """
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            # The descriptor stays whose it is: this is a second one for the same socket.
            copy = os.dup(int(entry.name))
        except OSError:  # closed meanwhile
            continue
        with socket.socket(fileno=copy) as found:
            if found.type == socket.SOCK_STREAM and found.family in (socket.AF_INET, socket.AF_INET6):
                info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += int(struct.unpack_from("<Q", info, _BYTES_ACKED_AT)[0])
    return total


def cpu_s(pid: int) -> float:
    """Processor time of the threads that a process has now, to the nanosecond."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text(encoding="ascii").split()[0]) for task in tasks) / 1e9


class _Timed(AsyncWeightClient):
    """Notes how long its last stream and its last staging took, and the processor time of `pids` during the stream."""

    pids: Sequence[int] = ()
    stream_s = 0.0
    stage_s = 0.0
    stream_cpu_s: Sequence[float] = ()

    async def push(
        self,
        push_id: str,
        chunks: AsyncIterable[WeightChunk] | Iterable[WeightChunk],
        *,
        relay: Sequence[RelayHop] = (),
        timeout: float | None = None,
    ) -> PushReceipt:
        before, started = [cpu_s(pid) for pid in self.pids], time.perf_counter()
        receipt = await super().push(push_id, chunks, relay=relay, timeout=timeout)
        self.stream_s = time.perf_counter() - started
        self.stream_cpu_s = [cpu_s(pid) - spent for pid, spent in zip(self.pids, before, strict=True)]
        return receipt

    async def stage(self, push_id: str, digest: bytes, *, timeout: float | None = None) -> WeightSnapshot:
        started = time.perf_counter()
        snapshot = await super().stage(push_id, digest, timeout=timeout)
        self.stage_s = time.perf_counter() - started
        return snapshot


class Trainer:
    """Publishes to replicas with one manifest; each series of publications is an attempt of one run."""

    def __init__(self, pids: dict[str, int], manifest: Manifest) -> None:
        self.pids = pids
        self.manifest = manifest
        generator = torch.Generator().manual_seed(0)
        self.tensors = {
            spec.name: (0.02 * torch.randn(spec.shape, generator=generator)).to(getattr(torch, spec.dtype))
            for spec in manifest
        }
        self.attempt = 0

    async def series(
        self, name: str, targets: Sequence[str], topology: Topology, repetitions: int, *, is_delta: bool = False
    ) -> None:
        """Publishes once to warm up, and then counts."""
        self.attempt += 1
        run_id = f"{RUN}.{self.attempt}"
        clients: list[_Timed] = []

        def connect(target: str) -> _Timed:
            client = _Timed(target)
            client.pids = [os.getpid(), *(self.pids[one] for one in targets)]
            clients.append(client)
            return client

        publisher = Publisher(
            connect,
            run_id=run_id,
            targets=targets,
            settings=PublishSettings(encoding=PushEncoding.DELTA if is_delta else PushEncoding.DENSE),
            delivery=RelayDelivery(RelaySettings(topology=topology, gather_seconds=10.0)),
        )
        for step in range(repetitions + 1):
            if is_delta and step:
                self._change(step)
            image = WeightImage(WeightVersion(run_id=run_id, step=step), self.tensors)
            before = sent_bytes()
            report = await publisher.publish(image)
            if report.failures:
                raise RuntimeError(f"{name}: {report.failures}")
            if step:
                first = max(clients, key=lambda client: client.stream_s)
                tell(
                    series=name,
                    seconds=report.seconds,
                    sent_bytes=sent_bytes() - before,
                    pushed_bytes=report.pushed_bytes,
                    stream_s=first.stream_s,
                    stream_cpu_s=list(first.stream_cpu_s),
                    stage_s=first.stage_s,
                )
        await publisher.close()

    async def hops(self, targets: Sequence[str], repetitions: int) -> None:
        """Times one chunk along chains of each length."""
        self.attempt += 1
        clients = [AsyncWeightClient(target) for target in targets]
        image = WeightImage(WeightVersion(), self.tensors)
        chunk = next(iter(image.chunks(self.manifest, max_bytes=2**20)))
        for step in range(1, repetitions + 1):
            for length in range(1, len(clients) + 1):
                version = WeightVersion(run_id=f"{RUN}.{self.attempt}", step=step)
                pushes = [await client.begin(version, self.manifest) for client in clients[:length]]
                route: tuple[RelayHop, ...] = ()
                for client, push in list(zip(clients, pushes, strict=False))[:0:-1]:
                    route = (RelayHop(target=client.target, push_id=push.push_id, next=route),)
                started = time.perf_counter()
                receipt = await clients[0].push(pushes[0].push_id, [chunk], relay=route)
                seconds = time.perf_counter() - started
                if [one.error for one in receipt.relayed] != [None] * (length - 1):
                    raise RuntimeError(f"a chain of {length}: {receipt.relayed}")
                tell(series="hops", length=length, seconds=seconds)
                for client, push in zip(clients, pushes, strict=False):
                    await client.abort(push.push_id)
        for client in clients:
            await client.close()

    def _change(self, seed: int) -> None:
        """Moves some elements to their neighbours, in copies: images are never changed."""
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in self.tensors.items():
            bits = tensor.clone().view(torch.int16 if tensor.itemsize == 2 else torch.int32)
            steps = (torch.rand(bits.shape, generator=generator) < CHANGED_SHARE).to(bits.dtype)
            self.tensors[name] = (bits + steps).view(tensor.dtype)


def tell(**values: Any) -> None:
    """Writes one line."""
    print(json.dumps(values), flush=True)


async def measure(pids: dict[str, int], repetitions: int, *, calibrate: bool) -> None:
    """All series."""
    targets = sorted(pids)
    async with AsyncWeightClient(targets[0]) as client:
        state = await client.state(include_manifest=True)
    trainer = Trainer(pids, state.manifest)
    tell(series="weights", dense_bytes=state.total_bytes)
    await trainer.series("one", targets[:1], Topology.DIRECT, repetitions)
    await trainer.series("chain", targets, Topology.CHAIN, repetitions)
    await trainer.series("tree", targets, Topology.TREE, repetitions)
    if calibrate:
        await trainer.series("two", targets[:2], Topology.CHAIN, repetitions)
        # Half of the fleet, to see what more processes than cores cost each other.
        half = targets[: max(2, len(targets) // 2)]
        await trainer.series("half", half, Topology.CHAIN, repetitions)
        await trainer.series("delta, half", half, Topology.CHAIN, repetitions, is_delta=True)
        await trainer.series("direct", targets, Topology.DIRECT, repetitions)
        await trainer.series("delta, one", targets[:1], Topology.DIRECT, repetitions, is_delta=True)
        for topology in (Topology.DIRECT, Topology.CHAIN, Topology.TREE):
            await trainer.series(f"delta, {topology}", targets, topology, repetitions, is_delta=True)
        await trainer.hops(targets, repetitions)


def main(repetitions: str, calibrate: str, *replicas: str) -> None:
    """Runs it."""
    keep_freed_memory()
    torch.set_num_threads(1)
    pids = {address: int(pid) for address, _, pid in (replica.rpartition("=") for replica in replicas)}
    asyncio.run(measure(pids, int(repetitions), calibrate=calibrate == "yes"))


if __name__ == "__main__":
    main(*sys.argv[1:])
