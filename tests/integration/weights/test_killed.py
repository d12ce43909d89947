"""Trainers and replicas that are killed in the middle of a push."""

import asyncio
import signal
from collections.abc import Iterator

import pytest
from tiny_fleet import START, WAIT_S, Fleet, Trainer
from tiny_models import save_model

from steersman.client.policy import AsyncPolicyClient

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    model = tmp_path_factory.mktemp("model")
    save_model("llama", model, 0)
    with Fleet(model, tmp_path_factory.mktemp("gates"), num_replicas=3) as fleet:
        yield fleet


async def test_a_trainer_killed_in_mid_push(fleet: Fleet) -> None:
    first, second, _ = fleet.targets
    targets = [first, second]
    # A push that waits for a quorum is leased for longer than this test waits for anything.
    async with Trainer.of(fleet, "sender.1", targets, activation="all_or_nothing") as trainer:
        await trainer.publish(1)
        async with AsyncPolicyClient(first) as client:
            running = asyncio.create_task(client.generate([5, 6], max_tokens=400, ignore_eos=True, timeout=WAIT_S))
            fleet.shut(first, "receive")
            await trainer.tell("publish", step=2)
            await fleet.entered(first, "receive")
            assert (await fleet.state(first)).pushing == trainer.version(2)
            await trainer.kill()
            fleet.open(first, "receive")
            await fleet.until_free(first)
            await fleet.assert_serves(trainer.version(1), first)
            (sample,) = await running
        fleet.assert_drawn_from([trainer.version(1)], [5, 6], sample)
    async with Trainer.of(fleet, "sender.2", targets) as successor:
        assert (await successor.publish(2))["failures"] == {}
        await fleet.assert_serves(successor.version(2), *targets)


async def test_a_trainer_killed_when_all_is_staged(fleet: Fleet) -> None:
    first, second, _ = fleet.targets
    targets = [first, second]
    async with Trainer.of(fleet, "stager.1", targets, activation="all_or_nothing") as trainer:
        await trainer.publish(1)
        holds = [{"target": target, "call": "activate", "kind": "hold"} for target in targets]
        await trainer.tell("publish", step=2, faults=holds)
        for _ in targets:
            await trainer.expect("held", call="activate")
        await trainer.kill()
        for target in targets:
            staged = (await fleet.state(target)).staged
            assert staged is not None
            assert staged.version == trainer.version(2)
        await fleet.assert_serves(trainer.version(1), *targets)
    async with Trainer.of(fleet, "stager.2", targets) as successor:  # while what is staged is leased for minutes
        assert (await successor.publish(2))["failures"] == {}
        await fleet.assert_serves(successor.version(2), *targets)


@pytest.mark.parametrize("gate", ["receive", "stage", "activate"])
async def test_a_replica_killed_in_the_middle(fleet: Fleet, gate: str) -> None:
    victim, *others = fleet.targets
    async with Trainer.of(fleet, f"{gate}.1") as trainer:
        await trainer.publish(1)
        await fleet.assert_serves(trainer.version(1), victim)
        fleet.shut(victim, gate)
        await trainer.tell("publish", step=2)
        await fleet.entered(victim, gate)
        fleet.kill(victim, signal.SIGKILL)
        report = await trainer.expect("published")
        assert list(report["failures"]) == [victim]
        await fleet.assert_serves(trainer.version(2), *others)
        await fleet.restart(victim)
        await fleet.assert_serves(START, victim)
        await trainer.ensure(victim)
        await fleet.assert_serves(trainer.version(2), victim)


async def test_a_relay_whose_middle_stands_still(fleet: Fleet) -> None:
    first, middle, last = fleet.targets
    async with Trainer.of(fleet, "still.1", topology="chain", stage_timeout_seconds=10.0) as trainer:
        await trainer.publish(1)
        await trainer.tell("publish", step=2, faults=[{"target": first, "call": "push", "kind": "hold", "chunk": 8}])
        await trainer.expect("held", target=first)
        fleet.kill(middle, signal.SIGSTOP)
        try:
            await trainer.tell("go")
            report = await trainer.expect("published")
            assert report["failures"] == {middle: "has not staged in time"}
            await fleet.assert_serves(trainer.version(2), first, last)
        finally:
            fleet.kill(middle, signal.SIGCONT)
        await trainer.ensure(middle)
        await fleet.assert_serves(trainer.version(2), middle)


async def test_a_relay_whose_middle_is_killed(fleet: Fleet) -> None:
    first, middle, last = fleet.targets
    async with Trainer.of(fleet, "relay.1", topology="chain") as trainer:
        await trainer.publish(1)
        await trainer.tell("publish", step=2, faults=[{"target": first, "call": "push", "kind": "hold", "chunk": 8}])
        await trainer.expect("held", target=first)
        assert {(await fleet.state(target)).pushing for target in fleet.targets} == {trainer.version(2)}
        fleet.kill(middle, signal.SIGKILL)
        await trainer.tell("go")
        report = await trainer.expect("published")
        assert list(report["failures"]) == [middle]
        await fleet.assert_serves(trainer.version(2), first, last)
        await fleet.restart(middle)
        await fleet.assert_serves(START, middle)
        await trainer.ensure(middle)
        await fleet.assert_serves(trainer.version(2), middle)
        assert (await trainer.publish(3))["failures"] == {}
        await fleet.assert_serves(trainer.version(3), *fleet.targets)
