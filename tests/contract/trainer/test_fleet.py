"""Many replicas: slow, stuck, refusing, vanished and new ones, with and without a quorum."""

import asyncio
from contextlib import suppress

import pytest
from fleet_fakes import RUN, begins, fleet, holds, images, publisher_of, service, serving, version

from steersman.trainer.weights.ports import WeightsRefused
from steersman.trainer.weights.publication import QuorumNotStaged
from steersman.trainer.weights.settings import ActivationMode, PublishSettings
from steersman.wire.errors import Reason, SteersmanError, unavailable

ALL = ActivationMode.ALL_OR_NOTHING
SOON = 0.3
"""Deadline of publications that are to miss it."""


def activations(*services) -> list[str]:
    return [event for one in services for event in one.events if event.startswith("activate")]


def away(times: int) -> list[SteersmanError]:
    return [unavailable("away")] * times


async def test_a_slow_replica_does_not_hold_up_the_others() -> None:
    slow, quick = service(), service()
    (first,) = images(1)
    release = slow.hold("push")
    async with fleet(slow, quick) as (publisher, _):
        publishing = asyncio.create_task(publisher.publish(first))
        await quick.until(lambda: holds(quick, first))
        assert not publishing.done()
        release.set()
        assert (await publishing).failures == {}
    assert holds(slow, first)


@pytest.mark.parametrize("step", ["state", "begin", "push", "stage"])
async def test_a_stuck_replica_costs_a_step_no_more_than_the_deadline_and_is_repaired_before_prompts(step: str) -> None:
    stuck, quick = service(), service()
    first, second = images(2)
    release = stuck.hold(step)
    async with fleet(stuck, quick, stage_timeout_seconds=SOON) as (publisher, [replica, _]):
        report = await publisher.publish(first)
        assert report.failures[replica.target] == "has not staged in time"
        assert publisher.wanted == first.version
        current = asyncio.create_task(publisher.ensure_current(replica.target))
        await quick.until(lambda: holds(quick, first))
        assert not current.done()
        release.set()
        await current
        assert holds(stuck, first)
        await publisher.publish(second)
        await stuck.until(lambda: holds(stuck, second))
    # What was under way at the deadline went on, and nothing was sent twice.
    assert begins(stuck) == [f"{RUN}@0", f"{RUN}@1 from {RUN}@0"]


async def test_a_push_that_is_overtaken_ends_and_the_rest_follows_as_a_difference() -> None:
    slow, quick = service(), service()
    first, second, third = images(3)
    async with fleet(slow, quick, stage_timeout_seconds=SOON) as (publisher, [replica, _]):
        await publisher.publish(first)
        await slow.until(lambda: holds(slow, first))  # the deadline is short, and this machine may be slow
        release = slow.hold("stage")
        await publisher.publish(second)
        await slow.until(lambda: slow.held_at == "stage")
        await publisher.publish(third)
        release.set()
        await publisher.ensure_current(replica.target)
    assert holds(slow, third)
    assert begins(slow)[1:] == [f"{RUN}@1 from {RUN}@0", f"{RUN}@2 from {RUN}@1"]


async def test_old_weights_are_held_for_the_slowest_replica_only() -> None:
    slowest, slow, quick = service(), service(), service()
    made = images(4)
    async with fleet(slowest, slow, quick, stage_timeout_seconds=SOON) as (publisher, replicas):
        slowest.hold("push")
        await publisher.publish(made[0])
        await slow.until(lambda: holds(slow, made[0]))
        slow.hold("push")
        await publisher.publish(made[1])
        await slow.until(lambda: slow.held_at == "push")
        await publisher.publish(made[2])
        assert "abort" not in slow.events
        await publisher.publish(made[3])
        await slow.until(lambda: "abort" in slow.events)
        assert "abort" not in slowest.events
        slowest.release()
        slow.release()
        await asyncio.gather(*(publisher.ensure_current(one.target) for one in replicas))
    assert all(holds(one, made[3]) for one in (slowest, slow, quick))


async def test_nobody_activates_before_all_have_staged() -> None:
    fleet_of = [service() for _ in range(4)]
    (first,) = images(1)
    last = fleet_of[-1].hold("stage")
    async with fleet(*fleet_of, activation=ALL) as (publisher, _):
        publishing = asyncio.create_task(publisher.publish(first))
        for one in fleet_of[:-1]:
            await one.until(lambda one=one: one.staged is not None)
        await fleet_of[-1].until(lambda: fleet_of[-1].held_at == "stage")
        assert (activations(*fleet_of), publisher.wanted) == ([], None)
        last.set()
        report = await publishing
    assert all(holds(one, first) for one in fleet_of)
    assert report.failures == {}
    assert 0 < report.activation_skew_seconds < report.seconds


async def test_a_quorum_activates_and_those_that_are_late_follow() -> None:
    late, *others = [service() for _ in range(3)]
    (first,) = images(1)
    release = late.hold("push")
    async with fleet(late, *others, activation=ALL, quorum=0.6) as (publisher, _):
        publishing = asyncio.create_task(publisher.publish(first))
        for one in others:
            await one.until(lambda one=one: holds(one, first))
        assert publisher.wanted == first.version
        release.set()
        assert (await publishing).failures == {}
    assert holds(late, first)


async def test_without_a_quorum_nothing_changes_and_the_same_version_may_be_published_again() -> None:
    stuck, *others = [service() for _ in range(3)]
    first, second = images(2)
    async with fleet(stuck, *others, activation=ALL, stage_timeout_seconds=1.0) as (publisher, replicas):
        while publisher.wanted is None:  # the deadline is short, and this machine may be slow
            with suppress(QuorumNotStaged):
                await publisher.publish(first)
        release = stuck.hold("push")
        with pytest.raises(QuorumNotStaged, match=rf"of 3 replicas, needed are 3; .*{replicas[0].target}: has not"):
            await publisher.publish(second)
        assert publisher.wanted == first.version
        assert all(holds(one, first) for one in (stuck, *others))
        assert all("abort" in one.events and one.staged is None for one in others)
        assert publisher.accepts(RUN, 0, oldest_step=0)
        assert not publisher.accepts(RUN, 1, oldest_step=0)
        # Who asks meanwhile gets what is wanted still.
        await publisher.ensure_current(replicas[1].target)
        assert holds(others[0], first)
        release.set()
        while publisher.wanted != second.version:
            with suppress(QuorumNotStaged):
                await publisher.publish(second)
        await asyncio.gather(*(publisher.ensure_current(one.target) for one in replicas))
    assert all(holds(one, second) for one in (stuck, *others))


async def test_a_quorum_that_is_out_of_reach_is_not_waited_for() -> None:
    broken, fine = service(), service()
    broken.faults["begin"] = away(3)
    (first,) = images(1)
    async with fleet(broken, fine, activation=ALL, stage_timeout_seconds=3000.0) as (publisher, [replica, _]):
        with pytest.raises(QuorumNotStaged, match=rf"{replica.target}: ENGINE_UNAVAILABLE: away"):
            await publisher.publish(first)
        assert activations(broken, fine) == []
        assert publisher.wanted is None
        assert (await publisher.publish(first)).failures == {}
    assert holds(broken, first)
    assert holds(fine, first)


async def test_a_refusal_for_good_ends_a_publication_before_anybody_activates() -> None:
    refusing, fine = service(), service()
    refusing.faults["begin"] = [SteersmanError(Reason.WEIGHT_VERSION_STALE, "older")]
    (first,) = images(1)
    async with fleet(refusing, fine, activation=ALL) as (publisher, _):
        with pytest.raises(WeightsRefused, match="WEIGHT_VERSION_STALE"):
            await publisher.publish(first)
    assert activations(refusing, fine) == []
    assert fine.staged is None


async def test_an_activation_that_is_lost_after_the_decision_is_made_up_for() -> None:
    broken, fine = service(), service()
    broken.faults["activate"] = away(1)
    (first,) = images(1)
    async with fleet(broken, fine, activation=ALL) as (publisher, _):
        assert (await publisher.publish(first)).failures == {}
    assert broken.events.count("push") == 1
    assert holds(broken, first)


async def test_a_replica_that_restarts_while_it_waits_for_the_others_gets_everything_again() -> None:
    restarted, last = service(), service()
    (first,) = images(1)
    release = last.hold("stage")
    async with fleet(restarted, last, activation=ALL) as (publisher, _):
        publishing = asyncio.create_task(publisher.publish(first))
        await restarted.until(lambda: restarted.staged is not None)
        restarted.restart()
        restarted.faults["activate"] = [SteersmanError(Reason.WEIGHT_PUSH_NOT_ACTIVE, "not staged")]
        release.set()
        assert (await publishing).failures == {}
    assert holds(restarted, first)
    assert holds(last, first)


async def test_a_replica_that_vanishes_is_not_waited_for() -> None:
    vanishing, staying = service(), service()
    (first,) = images(1)
    vanishing.hold("push")
    async with fleet(vanishing, staying, activation=ALL) as (publisher, [gone, stays]):
        publishing = asyncio.create_task(publisher.publish(first))
        await staying.until(lambda: staying.staged is not None)
        await vanishing.until(lambda: vanishing.held_at == "push")
        await publisher.update_targets([stays.target])
        assert (await publishing).failures == {}
        assert publisher.targets == (stays.target,)
        with pytest.raises(SteersmanError, match="is not one of the replicas"):
            await publisher.ensure_current(gone.target)
    assert holds(staying, first)
    assert "abort" in vanishing.events


async def test_a_replica_that_joins_gets_the_weights_and_part_in_the_next_publication() -> None:
    early, late = service(), service()
    first, second = images(2)
    async with serving(early, late) as replicas:
        publisher = publisher_of([replicas[0].target])
        await publisher.publish(first)
        await publisher.update_targets([one.target for one in replicas])
        await publisher.ensure_current(replicas[1].target)
        assert holds(late, first)
        report = await publisher.publish(second)
        await publisher.close()
    assert begins(late) == [f"{RUN}@0", f"{RUN}@1 from {RUN}@0"]
    assert report.delta_share > 0.99


async def test_asking_again_does_nothing_at_a_replica_that_is_current() -> None:
    one = service()
    (first,) = images(1)
    async with fleet(one) as (publisher, [replica]):
        await publisher.publish(first)
        events = list(one.events)
        await asyncio.gather(*(publisher.ensure_current(replica.target) for _ in range(5)))
    assert one.events == events


async def test_of_two_jobs_the_later_one_keeps_the_replica_and_the_other_is_told() -> None:
    one = service()
    ours, others = images(2, run_id="ours.1"), images(2, run_id="others.1")
    async with serving(one) as [replica]:
        first = publisher_of([replica.target], run_id="ours.1")
        second = publisher_of([replica.target], run_id="others.1")
        await first.publish(ours[0])
        # While one pushes, the other cannot.
        release = one.hold("push")
        pushing = asyncio.create_task(first.publish(ours[1]))
        await one.until(lambda: one.held_at == "push")
        report = await second.publish(others[0])
        assert "WEIGHT_PUSH_IN_PROGRESS" in report.failures[replica.target]
        release.set()
        await pushing
        assert holds(one, ours[1])
        # Then it may, and the one before does not take the replica back.
        await second.ensure_current(replica.target)
        assert holds(one, others[0])
        with pytest.raises(WeightsRefused, match=r"now serves others\.1@0: another trainer has taken it over"):
            await first.ensure_current(replica.target)
        assert holds(one, others[0])
        await first.close()
        await second.close()


async def test_an_earlier_attempt_that_comes_back_is_refused_whatever_its_step() -> None:
    one = service()
    old, new = images(9, run_id="demo.1"), images(2, run_id="demo.2")
    async with serving(one) as [replica]:
        revived = publisher_of([replica.target], run_id="demo.1")
        resumed = publisher_of([replica.target], run_id="demo.2")
        await revived.publish(old[7])
        await resumed.publish(new[1])
        with pytest.raises(WeightsRefused, match="WEIGHT_VERSION_STALE"):
            await revived.publish(old[8])
        await revived.close()
        await resumed.close()
    assert holds(one, new[1])
    assert one.active == version(1, "demo.2")


@pytest.mark.parametrize(
    ("quorum", "num_replicas", "required"),
    [(1.0, 3, 3), (0.5, 3, 2), (0.5, 4, 2), (0.1, 30, 3), (0.01, 3, 1), (0.7, 10, 7), (1.0, 0, 0)],
)
def test_how_many_are_a_quorum(quorum: float, num_replicas: int, required: int) -> None:
    assert PublishSettings(quorum=quorum).required(num_replicas) == required


@pytest.mark.parametrize("settings", [{"quorum": 0.0}, {"quorum": 1.1}, {"stage_timeout_seconds": 0.0}])
def test_settings_out_of_range_are_refused(settings) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*, allowed"):
        PublishSettings(**settings)
