"""Which replica gets the next prompt while replicas come, fail and go."""

import asyncio
from typing import Any

import pytest
import rollout_fakes as fakes

from steersman.trainer.retry import Backoff, GaveUp, Waits
from steersman.trainer.rollout.replicas import ReplicaPool


class Ports:
    """Makes ports; `events` tells which were made and closed."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __call__(self, target: str) -> fakes.FakePolicy:
        self.events.append(f"{target} made")
        return fakes.FakePolicy(target, events=self.events)


def pool(ports: Ports, gate: fakes.FakeGate, *targets: str, **options: Any) -> ReplicaPool:
    options = {"backoff": Backoff(), "waits": Waits(), "sleep": fakes.no_sleep} | options
    return ReplicaPool(ports, gate, targets=targets, **options)


async def leased(one: ReplicaPool) -> str:
    async with asyncio.timeout(20), one.lease(1) as (replica, _):
        return replica.port.target


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_new_replica_passes_the_gate_before_it_is_leased() -> None:
    ports, gate = Ports(), fakes.FakeGate()
    one = pool(ports, gate, "policy-0")
    one.check_all()
    async with one.lease(1):
        one.update_targets(["policy-0", "policy-1"])
        assert one.targets == ("policy-0", "policy-1")
        assert await leased(one) == "policy-0"  # busy, but the other has not passed the gate yet
        await settle()
        assert await leased(one) == "policy-1"
    assert gate.events == ["policy-0 current", "policy-1 current"]
    await one.close()


class Slow(fakes.FakeGate):
    """Takes its time with the second replica."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = asyncio.Event()

    async def ensure_current(self, target: str) -> None:
        if target == "policy-1":
            await self.opened.wait()
        await super().ensure_current(target)


async def test_a_batch_is_spread_though_one_replica_answers_before_the_other() -> None:
    gate = Slow()
    one = pool(Ports(), gate, "policy-0", "policy-1")
    one.check_all()
    waiting = [asyncio.create_task(one.lease(1).__aenter__()) for _ in range(8)]
    await settle()
    assert gate.events == ["policy-0 current"]
    assert not any(task.done() for task in waiting)
    gate.opened.set()
    async with asyncio.timeout(20):
        leases = [await task for task in waiting]
    assert sorted(replica.port.target for replica, _ in leases) == ["policy-0"] * 4 + ["policy-1"] * 4
    await one.close()


async def test_nobody_waits_long_for_a_replica_that_does_not_answer() -> None:
    one = pool(Ports(), Slow(), "policy-0", "policy-1")
    one.check_all()
    assert [await leased(one) for _ in range(3)] == ["policy-0"] * 3
    await one.close()


async def test_before_the_first_batch_nobody_is_put_to_the_gate() -> None:
    ports, gate = Ports(), fakes.FakeGate()
    one = pool(ports, gate)
    one.update_targets(["policy-0"])  # nothing was published yet
    await settle()
    assert gate.events == []
    one.check_all()
    assert await leased(one) == "policy-0"
    await one.close()


async def test_one_that_is_gone_gets_nothing_more_and_is_closed_when_it_has_ended() -> None:
    ports, gate = Ports(), fakes.FakeGate()
    one = pool(ports, gate, "policy-0", "policy-1")
    one.check_all()
    await settle()
    async with one.lease(1) as (leaving, epoch):
        assert leaving.port.target == "policy-0"
        one.update_targets(["policy-1"])
        await settle()
        assert [await leased(one) for _ in range(3)] == ["policy-1"] * 3
        assert not one.failed(leaving, epoch)
        assert "policy-0 closed" not in ports.events
    await settle()
    assert ports.events[-1] == "policy-0 closed"
    await one.close()
    assert ports.events.count("policy-0 closed") == 1
    assert ports.events[-1] == "policy-1 closed"


async def test_one_that_comes_back_under_its_old_address_is_another() -> None:
    ports, gate = Ports(), fakes.FakeGate()
    one = pool(ports, gate, "policy-0")
    one.check_all()
    async with one.lease(1) as (old, epoch):
        one.update_targets([])
        one.update_targets(["policy-0"])
        async with asyncio.timeout(20), one.lease(1) as (new, _):
            assert new is not old
            assert not one.failed(old, epoch)
    assert gate.events == ["policy-0 current"] * 2
    await one.close()


async def test_the_recovery_of_one_that_is_gone_ends() -> None:
    ports = Ports()
    looks = 0

    def alive(number: int) -> bool:
        nonlocal looks
        looks += number == 0
        return number == 1

    one = pool(ports, fakes.FakeGate(alive=alive), "policy-0", "policy-1")
    one.check_all()
    await settle()
    assert looks > 0
    one.update_targets(["policy-1"])
    await settle()
    before = looks
    await settle()
    assert looks == before
    await one.close()


async def test_one_long_dead_does_not_end_the_patience_with_the_others() -> None:
    now = [0.0]
    ports = Ports()
    alive = {0: False, 1: True}
    gate = fakes.FakeGate(alive=lambda number: alive[number])
    one = pool(ports, gate, "policy-0", "policy-1", waits=Waits(clock=lambda: now[0]), backoff=Backoff())
    one.check_all()
    await settle()
    now[0] = 10_000.0  # policy-0 is away for longer than anybody waits, but policy-1 was there
    async with one.lease(1) as (replica, epoch):
        alive[1] = False
        assert one.failed(replica, epoch)
    await settle()
    alive[1] = True
    assert await leased(one) == "policy-1"
    # Now none is there for too long.
    async with one.lease(1) as (replica, epoch):
        alive[1] = False
        assert one.failed(replica, epoch)
    await settle()
    now[0] = 20_000.0
    with pytest.raises(GaveUp, match="stayed away"):
        await leased(one)
    await one.close()


async def test_patience_without_any_target_ends_with_the_reason() -> None:
    now = [0.0]
    waits = Waits(clock=lambda: now.__setitem__(0, now[0] + 1.0) or now[0])
    one = pool(Ports(), fakes.FakeGate(), waits=waits, explain_absence=lambda: "3 endpoints, none ready")
    one.check_all()
    with pytest.raises(GaveUp, match=r"no policy replica appeared for 18\d\d s: 3 endpoints, none ready"):
        await leased(one)
    # The next batch waits anew.
    one.check_all()
    waiting = asyncio.create_task(leased(one))
    await settle()
    one.update_targets(["policy-0"])
    assert await waiting == "policy-0"
    assert waits.text() == ""
    await one.close()


async def test_who_waits_when_the_pool_is_closed_is_told() -> None:
    one = pool(Ports(), fakes.FakeGate(alive=lambda _: False), "policy-0")
    one.check_all()
    waiting = asyncio.create_task(leased(one))
    await settle()
    await one.close()
    with pytest.raises(GaveUp, match="the rollout was closed"):
        await waiting
