"""Versions of weights, and a publisher before weight services behind real servers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch
from fake_weight_service import FakeWeightService, Replica, manifest

from steersman.client import AsyncWeightClient, ChannelSettings
from steersman.trainer.weights.delivery import Delivery
from steersman.trainer.weights.image import WeightImage
from steersman.trainer.weights.publisher import Publisher
from steersman.trainer.weights.settings import PublishSettings
from steersman.wire.identity import WeightVersion

RUN = "demo.1"
SHAPES = {"a.embed": (256, 128), "b.norm": (64,), "c.up": (128, 192), "d.empty": (0,), "e.down": (192, 128)}
NUM_ELEMENTS = 256 * 128 + 64 + 128 * 192 + 192 * 128


def service(dtype: str = "BFLOAT16", *, rows: int = 1) -> FakeWeightService:
    """A replica of SHAPES, with so many times the rows."""
    specs = {name: ((rows * shape[0], *shape[1:]), dtype) for name, shape in SHAPES.items()}
    made = FakeWeightService(manifest(specs))
    made.max_chunk_bytes = 8192
    return made


def version(step: int, run_id: str = RUN) -> WeightVersion:
    return WeightVersion(run_id=run_id, step=step)


def images(count: int, *, share: float = 0.02, run_id: str = RUN) -> list[WeightImage]:
    """Versions of float32 weights, a share of which moves from each to the next."""
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made = []
    for step in range(count):
        made.append(WeightImage(version(step, run_id), {name: tensor.clone() for name, tensor in tensors.items()}))
        for tensor in tensors.values():
            tensor[torch.rand(tensor.shape, generator=generator) < share] *= 1.01
    return made


def holds(service: FakeWeightService, image: WeightImage, dtype: torch.dtype = torch.bfloat16) -> bool:
    tensors = {
        name: tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        for name, tensor in image._tensors.items()
    }
    return service.active == image.version and service.tensors == tensors


async def no_sleep(_: float) -> None:
    await asyncio.sleep(0)


def connect(target: str) -> AsyncWeightClient:
    once = ChannelSettings(retry_attempts=1, max_reconnect_seconds=0.2)
    return AsyncWeightClient(target, settings=once, timeout=20.0)


def publisher_of(targets: list[str], *, run_id: str = RUN, delivery: Delivery | None = None, **settings) -> Publisher:
    return Publisher(
        connect,
        targets=targets,
        run_id=run_id,
        settings=PublishSettings(**settings),
        delivery=delivery,
        sleep=no_sleep,
    )


@asynccontextmanager
async def serving(*services: FakeWeightService) -> AsyncIterator[list[Replica]]:
    """Real servers before these services."""
    replicas = [Replica(one) for one in services]
    for replica in replicas:
        await replica.start()
    try:
        async with asyncio.timeout(60):
            yield replicas
    finally:
        for one in services:
            one.release()
        for replica in replicas:
            await replica.stop()


@asynccontextmanager
async def fleet(
    *services: FakeWeightService, delivery: Delivery | None = None, **settings
) -> AsyncIterator[tuple[Publisher, list[Replica]]]:
    """A publisher of these settings and its replicas."""
    async with serving(*services) as replicas:
        publisher = publisher_of([replica.target for replica in replicas], delivery=delivery, **settings)
        try:
            yield publisher, replicas
        finally:
            await publisher.close()


def begins(service: FakeWeightService) -> list[str]:
    return [event.removeprefix("begin ") for event in service.events if event.startswith("begin")]
