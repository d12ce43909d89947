"""The publisher and real weight servers that pass chunks on: everybody gets the weights, whatever breaks on the way."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from relay_fleet import MANIFEST, Fault, FlippedBit, Node, Stuck, fleet

from steersman.client import AsyncWeightClient, ChannelSettings, Push, PushReceipt, RelayHop
from steersman.policy.weights import relay as policy_relay
from steersman.policy.weights.relay import RelayRules
from steersman.trainer.weights import relay as trainer_relay
from steersman.trainer.weights.image import WeightImage
from steersman.trainer.weights.publisher import Publisher
from steersman.trainer.weights.relay import RelayDelivery, RelaySettings
from steersman.trainer.weights.routes import Topology
from steersman.v1 import weights_pb2
from steersman.wire.identity import WeightVersion

RUN = "demo.1"
CHUNK_BYTES = 64 * 1024
SHAPE = MANIFEST.tensors[0].shape
ONCE = MANIFEST.total_bytes
Routes = list[tuple[str, list[Any]]]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is given up first is told by this: more than a loaded machine's event loop ever stands still."""
    for module in (trainer_relay, policy_relay):
        monkeypatch.setattr(module, "_PATIENCE_PER_LEVEL_S", 0.6)


def image(step: int, seed: int | None = None) -> WeightImage:
    generator = torch.Generator().manual_seed(step if seed is None else seed)
    tensor = torch.randint(0, 2**31 - 1, SHAPE, generator=generator, dtype=torch.int32).view(torch.float32)
    return WeightImage(WeightVersion(run_id=RUN, step=step), {"w": tensor})


def content(wanted: WeightImage) -> bytes:
    [spec] = MANIFEST.tensors
    return wanted.elements(spec).tobytes()  # type: ignore[arg-type]


class Port(AsyncWeightClient):
    """Many small chunks, so that a stream has a middle; `routes` tells what left from here, and to whom. Pushes are
    begun while the target `answers`.
    """

    routes: Routes
    answers: dict[str, asyncio.Event]

    async def begin(self, *args: Any, **options: Any) -> Push:
        if self.target in self.answers:
            await self.answers[self.target].wait()
        return replace(await super().begin(*args, **options), max_chunk_bytes=CHUNK_BYTES)

    async def push(self, push_id: str, chunks: Any, *, relay: Sequence[RelayHop] = (), **options: Any) -> PushReceipt:
        self.routes.append((self.target, [shape(hop) for hop in relay]))
        return await super().push(push_id, chunks, relay=relay, **options)


def shape(hop: RelayHop) -> tuple[str, list[Any]]:
    return hop.target, [shape(behind) for behind in hop.next]


async def no_sleep(_: float) -> None:
    await asyncio.sleep(0)


@asynccontextmanager
async def publishing(
    num_nodes: int,
    topology: Topology,
    *,
    faults: dict[int, Fault] | None = None,
    rules: RelayRules | None = None,
    answers: dict[str, asyncio.Event] | None = None,
) -> AsyncIterator[tuple[Publisher, list[Node], Routes]]:
    once = ChannelSettings(retry_attempts=1, max_reconnect_seconds=0.2)
    routes: Routes = []

    def connect(target: str) -> Port:
        port = Port(target, settings=once, timeout=20.0)
        port.routes = routes
        port.answers = answers if answers is not None else {}
        return port

    async with fleet(num_nodes, faults=faults, rules=rules, are_open=False) as nodes:
        delivery = RelayDelivery(RelaySettings(topology=topology, stall_seconds=1.0))
        targets = [node.target for node in nodes]
        publisher = Publisher(connect, run_id=RUN, targets=targets, delivery=delivery, sleep=no_sleep)
        try:
            yield publisher, nodes, routes
        finally:
            await publisher.close()


def serve(nodes: Sequence[Node], wanted: WeightImage) -> bool:
    """True if every one serves these weights, to the bit."""
    return all(node.store.active.version == wanted.version and node.engine.loaded == content(wanted) for node in nodes)


def chain(targets: Sequence[str]) -> list[Any]:
    return [(targets[0], chain(targets[1:]))] if targets else []


async def test_a_chain_sends_once() -> None:
    async with publishing(4, Topology.CHAIN) as (publisher, nodes, routes):
        wanted = image(0)
        report = await publisher.publish(wanted)
        assert routes == chain([node.target for node in nodes])
        assert (report.failures, report.pushed_bytes) == ({}, ONCE)
        assert serve(nodes, wanted)


async def test_a_tree_sends_once() -> None:
    async with publishing(7, Topology.TREE) as (publisher, nodes, routes):
        wanted = image(0)
        report = await publisher.publish(wanted)
        a, b, c, d, e, f, g = (node.target for node in nodes)
        assert routes == [(a, [(b, [(d, []), (e, [])]), (c, [(f, []), (g, [])])])]
        assert (report.failures, report.pushed_bytes) == ({}, ONCE)
        assert serve(nodes, wanted)


async def test_auto_relays_from_four_replicas_on() -> None:
    for num_nodes, num_streams in ((3, 3), (4, 1)):
        async with publishing(num_nodes, Topology.AUTO) as (publisher, nodes, routes):
            report = await publisher.publish(image(0))
            assert (len(routes), report.pushed_bytes) == (num_streams, num_streams * ONCE)
            assert serve(nodes, image(0))


async def test_what_has_changed_travels_the_same_way() -> None:
    async with publishing(4, Topology.CHAIN) as (publisher, nodes, routes):
        await publisher.publish(image(0))
        tensor = image(0).elements(MANIFEST.tensors[0]).copy()  # type: ignore[arg-type]
        tensor[::50] += 1
        changed = torch.from_numpy(tensor.view("float32")).reshape(SHAPE)
        wanted = WeightImage(WeightVersion(run_id=RUN, step=1), {"w": changed})
        report = await publisher.publish(wanted)
        assert report.failures == {}
        assert report.delta_share == 1.0
        assert 0 < report.pushed_bytes < ONCE / 10
        assert len(routes) == 2
        assert serve(nodes, wanted)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("fault", [Stuck, FlippedBit])
async def test_a_fault_on_the_way_is_routed_round_within_the_publication(fault: type[Fault], number: int) -> None:
    async with publishing(4, Topology.CHAIN, faults={number: fault(count=40)}) as (publisher, nodes, routes):
        report = await publisher.publish(image(0))
        assert report.failures == {}
        assert serve(nodes, image(0))
        # Once more from here to the one that was struck, and for those behind it a route of their own.
        targets = [node.target for node in nodes]
        struck, behind = targets[number], targets[number + 1 :]
        assert routes[0] == chain(targets)[0]
        assert sorted(routes[1:]) == sorted([(struck, []), *chain(behind)])
        # Neither end of the link passes anything on next time; for the far one no other replica is relied on.
        routes.clear()
        wanted = image(1)
        assert (await publisher.publish(wanted)).failures == {}
        near = targets[number - 1 : number]
        relays = [target for target in targets if target != struck and target not in near]
        assert sorted(routes) == sorted([(struck, []), *chain([*relays, *near])])
        assert serve(nodes, wanted)


class Silent(Stuck):
    """The replica reads no further and answers nothing."""

    node: Node
    answers: dict[str, asyncio.Event]

    async def strike(self, raw: bytes) -> bytes:
        self.answers[self.node.target] = asyncio.Event()
        return await super().strike(raw)


async def test_a_replica_that_answers_nothing_holds_up_nobody_behind_it() -> None:
    fault = Silent(count=40)
    fault.answers = {}
    async with publishing(4, Topology.CHAIN, faults={1: fault}, answers=fault.answers) as (publisher, nodes, _):
        fault.node = nodes[1]
        others = [node for node in nodes if node is not fault.node]
        publication = asyncio.create_task(publisher.publish(image(0)))
        wanted = image(0)
        while any(node.store.active.version != wanted.version for node in others):
            await asyncio.sleep(0.01)
        assert serve(others, wanted)
        assert not publication.done()
        fault.answers[fault.node.target].set()
        assert (await publication).failures == {}
        assert serve(nodes, image(0))


class Stopping(Fault):
    """The replica ends in the middle of its stream."""

    node: Node

    async def strike(self, raw: bytes) -> bytes:
        self.stopped = asyncio.create_task(self.node.stop())
        return raw


@pytest.mark.parametrize("number", range(4))
async def test_a_replica_that_ends_in_mid_stream_is_the_only_one_that_stays_behind(number: int) -> None:
    fault = Stopping(count=40)
    async with publishing(4, Topology.CHAIN, faults={number: fault}) as (publisher, nodes, _):
        fault.node = nodes[number]
        report = await publisher.publish(image(0))
        await fault.stopped
        assert list(report.failures) == [fault.node.target]
        others = [node for node in nodes if node is not fault.node]
        assert serve(others, image(0))
        assert (await publisher.publish(image(1))).failures.keys() == {fault.node.target}
        assert serve(others, image(1))


async def test_a_fault_in_a_tree_leaves_the_other_branches_alone() -> None:
    async with publishing(7, Topology.TREE, faults={1: FlippedBit(count=40)}) as (publisher, nodes, routes):
        assert (await publisher.publish(image(0))).failures == {}
        assert serve(nodes, image(0))
        targets = [node.target for node in nodes]
        assert sorted(routes[1:]) == sorted([(targets[1], []), *chain([targets[3], targets[4]])])


async def test_replicas_that_do_not_relay_are_sent_to_from_here() -> None:
    async with publishing(4, Topology.CHAIN, rules=RelayRules(enabled=False)) as (publisher, nodes, _):
        assert (await publisher.publish(image(0))).failures == {}
        assert serve(nodes, image(0))


class Deaf(Fault):
    """An older server, which knows nothing of routes."""

    async def strike(self, raw: bytes) -> bytes:
        message = weights_pb2.PushChunksRequest.FromString(raw)
        message.ClearField("relay")
        return message.SerializeToString()


@pytest.mark.parametrize("number", range(4))
async def test_a_replica_that_knows_no_relay_is_no_hindrance(number: int) -> None:
    faults: dict[int, Fault] = {number: Deaf(num_streams=100)}
    async with publishing(4, Topology.CHAIN, faults=faults) as (publisher, nodes, routes):
        for step in range(2):
            assert (await publisher.publish(image(step))).failures == {}
            assert serve(nodes, image(step))
        # The second time it is the last of the chain, and no way round is needed.
        targets = [node.target for node in nodes]
        deaf = targets.pop(number)
        assert routes[-1:] == chain([*targets, deaf])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="fan_out is 1"):
        RelaySettings(fan_out=1)
