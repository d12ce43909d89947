"""Publications to real weight stores: what a quorum leaves behind, chains of deltas, trainers after each other."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import torch
from relay_fleet import MANIFEST, Fault, Node, fleet

from steersman.client import AsyncWeightClient, ChannelSettings
from steersman.trainer.weights.image import WeightImage
from steersman.trainer.weights.ports import WeightsRefused
from steersman.trainer.weights.publication import QuorumNotStaged
from steersman.trainer.weights.publisher import Publisher
from steersman.trainer.weights.settings import ActivationMode, PublishSettings
from steersman.wire.identity import WeightVersion

ALL = ActivationMode.ALL_OR_NOTHING
SHAPE = MANIFEST.tensors[0].shape


def images(count: int, run_id: str = "demo.1") -> list[WeightImage]:
    """Versions of which one element in a hundred moves from each to the next."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(SHAPE, generator=generator)
    made = []
    for step in range(count):
        made.append(WeightImage(WeightVersion(run_id=run_id, step=step), {"w": tensor.clone()}))
        tensor[torch.rand(SHAPE, generator=generator) < 0.01] += 1e-4
    return made


async def no_sleep(_: float) -> None:
    await asyncio.sleep(0)


def connect(target: str) -> AsyncWeightClient:
    return AsyncWeightClient(target, settings=ChannelSettings(retry_attempts=1), timeout=20.0)


@asynccontextmanager
async def publisher_of(nodes: Sequence[Node], run_id: str = "demo.1", **settings: Any) -> AsyncIterator[Publisher]:
    targets = [node.target for node in nodes]
    made = Publisher(connect, run_id=run_id, targets=targets, settings=PublishSettings(**settings), sleep=no_sleep)
    try:
        yield made
    finally:
        await made.close()


def serves(node: Node, image: WeightImage) -> bool:
    """True if engine and store have these weights, to the bit."""
    [spec] = MANIFEST.tensors
    same = node.engine.loaded == image.elements(spec).tobytes()  # type: ignore[arg-type]
    return same and node.store.active.version == image.version == node.engine.version


class Held(Fault):
    """Reads no further until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.release = asyncio.Event()

    async def strike(self, raw: bytes) -> bytes:
        await self.release.wait()
        return raw


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_replica_that_stayed_behind_gets_one_delta_after_the_other() -> None:
    made = images(4)
    async with fleet(2, are_open=False) as nodes, publisher_of(nodes) as publisher:
        await publisher.publish(made[0])
        await publisher.update_targets([nodes[1].target])
        for image in made[1:]:
            await publisher.publish(image)
        assert serves(nodes[0], made[0])
        await publisher.update_targets([node.target for node in nodes])
        nodes[0].engine.events.clear()
        await publisher.ensure_current(nodes[0].target)
        assert serves(nodes[0], made[3])
        assert serves(nodes[1], made[3])
        assert nodes[0].engine.events.count("activate") == 3
        assert nodes[0].store.active.digest == nodes[1].store.active.digest


async def test_nobody_activates_before_the_quorum_and_what_it_leaves_behind_is_nothing() -> None:
    made = images(2)
    async with (
        fleet(3, are_open=False) as nodes,
        publisher_of(nodes, activation=ALL, stage_timeout_seconds=1.0) as publisher,
    ):
        while publisher.wanted is None:  # a slow machine may miss the short deadline
            with suppress(QuorumNotStaged):
                await publisher.publish(made[0])
        nodes[0].engine.hold_stage.clear()
        for node in nodes:
            node.engine.events.clear()
        with pytest.raises(QuorumNotStaged):
            await publisher.publish(made[1])
        assert all("activate" not in node.engine.events for node in nodes)
        assert all(node.store.staged is None and node.store.pushing is None for node in nodes[1:])
        assert publisher.wanted == made[0].version
        nodes[0].engine.hold_stage.set()
        await until(lambda: nodes[0].store.pushing is None)
        await publisher.ensure_current(nodes[0].target)
        assert all(node.store.active.version == made[0].version for node in nodes)
        while publisher.wanted != made[1].version:
            with suppress(QuorumNotStaged):
                await publisher.publish(made[1])
        await asyncio.gather(*(publisher.ensure_current(node.target) for node in nodes))
        assert all(serves(node, made[1]) for node in nodes)


async def test_what_is_staged_waits_for_the_others_longer_than_between_two_chunks() -> None:
    (image,) = images(1)
    async with fleet(2, are_open=False) as nodes, publisher_of(nodes, activation=ALL) as publisher:
        nodes[0].engine.hold_stage.clear()
        publishing = asyncio.create_task(publisher.publish(image))
        await until(lambda: nodes[1].store.staged)
        push = nodes[1].store._push
        assert push is not None
        assert push.idle_timeout_s == 620.0
        nodes[0].engine.hold_stage.set()
        assert (await publishing).failures == {}
        assert all(serves(node, image) for node in nodes)


async def test_a_trainer_that_died_with_weights_staged_holds_up_its_successor_for_no_time() -> None:
    old, new = images(1), images(1, "demo.2")
    async with fleet(2, are_open=False) as nodes, publisher_of(nodes, activation=ALL) as dead:
        nodes[0].engine.hold_stage.clear()
        publishing = asyncio.create_task(dead.publish(old[0]))
        await until(lambda: nodes[1].store.staged)
        # Killed: nobody aborts anything.
        for replica in dead._replicas.values():
            replica.abort = no_abort  # type: ignore[method-assign]
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        assert nodes[1].store.staged is not None
        nodes[0].engine.hold_stage.set()
        async with publisher_of(nodes, "demo.2", activation=ALL) as successor:
            assert (await successor.publish(new[0])).failures == {}
            assert all(serves(node, new[0]) for node in nodes)
        # And the one before does not come back.
        with pytest.raises(WeightsRefused, match="WEIGHT_VERSION_STALE"):
            await dead.publish(images(9)[8])
        assert all(serves(node, new[0]) for node in nodes)


async def no_abort(_: str) -> None:
    return


async def test_of_two_trainers_at_once_one_pushes_and_the_other_is_told() -> None:
    (ours,), (theirs,) = images(1, "ours.1"), images(1, "theirs.1")
    async with (
        fleet(1, are_open=False) as [node],
        publisher_of([node], "ours.1") as first,
        publisher_of([node], "theirs.1") as second,
    ):
        held = node.servicer.fault = Held()
        pushing = asyncio.create_task(first.publish(ours))
        await held.received.wait()
        report = await second.publish(theirs)
        assert "WEIGHT_PUSH_IN_PROGRESS: run 'ours.1' is pushing ours.1@0" in report.failures[node.target]
        held.release.set()
        await pushing
        assert serves(node, ours)
        await second.ensure_current(node.target)
        assert serves(node, theirs)
        with pytest.raises(WeightsRefused, match="another trainer has taken it over"):
            await first.ensure_current(node.target)
        assert serves(node, theirs)
