"""One rank of a sharded trainer, told what to do by lines of JSON on its standard input.

    {"publish": step}       capture on every rank; the lead publishes
    {"targets": [...]}      the lead's replicas
    {"ensure": target}      the lead brings one up to date
    {"hold": count}         from now on this rank says {"holding": true} after so many chunks, and sends no more

The lead writes a line of JSON for each; the others write one when they have captured.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from sharded_versions import RUN, SHAPES, TIED, tensors, version
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from steersman.client import AsyncWeightClient, ChannelSettings, Push, PushReceipt, WeightChunk
from steersman.trainer.weights.publisher import Publisher
from steersman.trainer.weights.relay import RelayDelivery, RelaySettings
from steersman.trainer.weights.routes import Topology
from steersman.trainer.weights.settings import ActivationMode, PublishSettings
from steersman.trainer.weights.sharded import ShardedWeights, shards_of

CHUNK_BYTES = 16 * 1024
SETTINGS = PublishSettings(activation=ActivationMode.ALL_OR_NOTHING)


class Port(AsyncWeightClient):
    """Many small chunks, so that a stream has a middle."""

    hold: ClassVar[int | None] = None

    async def begin(self, *args: Any, **options: Any) -> Push:
        return replace(await super().begin(*args, **options), max_chunk_bytes=CHUNK_BYTES)

    async def push(self, push_id: str, chunks: Any, **options: Any) -> PushReceipt:
        return await super().push(push_id, self._held(chunks), **options)

    async def _held(self, chunks: AsyncIterator[WeightChunk]) -> AsyncIterator[WeightChunk]:
        count = 0
        async for chunk in chunks:
            if count == self.hold:
                say({"holding": True})
                await asyncio.Event().wait()
            count += 1
            yield chunk


class Model(nn.Module):
    """Tensors sharded over all ranks, or over one row of a mesh of two; a scalar and a norm that all hold whole."""

    def __init__(self, step: int, rows: int) -> None:
        super().__init__()
        size = dist.get_world_size()
        mesh = init_device_mesh("cpu", (rows, size // rows), mesh_dim_names=("replicate", "shard"))
        for name, tensor in tensors(step).items():
            if tensor.ndim and name != "norm":
                placements = [Replicate(), Shard(0)]
                tensor = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
            setattr(self, name, nn.Parameter(tensor))
        setattr(self, TIED, self.embed)


def connect(target: str) -> Port:
    return Port(target, settings=ChannelSettings(retry_attempts=1, max_reconnect_seconds=0.2), timeout=60.0)


async def main(rank: int, size: int, folder: str, topology: str, rows: int) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    sharded = ShardedWeights(connect)
    delivery = RelayDelivery(RelaySettings(topology=Topology(topology), stall_seconds=5.0))
    publisher = Publisher(connect, run_id=RUN, delivery=delivery, settings=SETTINGS) if rank == 0 else None
    say({"pid": os.getpid()})
    while line := await asyncio.to_thread(sys.stdin.readline):
        [(command, argument)] = json.loads(line).items()
        say(await do(command, argument, sharded, publisher, rows))
    if publisher is not None:
        await publisher.close()
    sharded.close()
    dist.destroy_process_group()


async def do(command: str, argument: Any, sharded: ShardedWeights, publisher: Publisher | None, rows: int) -> Any:
    if command == "publish":
        shards = list(shards_of(Model(argument, rows)))
        local = {shard.names[0]: shard.elements.numel() for shard in shards}
        image = await asyncio.to_thread(sharded.capture, shards, version(argument))
        assert (image is None) == (publisher is None)
        if publisher is None or image is None:
            return {"held": local}
        try:
            report = await publisher.publish(image)
        except Exception as error:
            return {"error": type(error).__name__, "message": str(error)}
        return {"failures": report.failures, "bytes": report.pushed_bytes, "delta_share": report.delta_share}
    if command == "hold":
        Port.hold = argument
        return {}
    assert publisher is not None
    if command == "targets":
        await publisher.update_targets(argument)
    elif command == "ensure":
        await publisher.ensure_current(argument)
    return {}


def say(answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert SHAPES
    assert DTensor
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])))
