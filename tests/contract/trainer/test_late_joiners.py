"""Replicas that missed versions: one delta after the other, or all weights, whichever is smaller."""

import asyncio

import pytest
import torch
from fleet_fakes import NUM_ELEMENTS, RUN, SHAPES, begins, fleet, holds, images, publisher_of, service, serving, version

from steersman.trainer.weights import cargo
from steersman.trainer.weights.encode import PushEncoding
from steersman.trainer.weights.image import WeightImage
from steersman.wire.errors import Reason, SteersmanError, unavailable

DENSE_BYTES = 2 * NUM_ELEMENTS


def chain(first: int, last: int) -> list[str]:
    return [f"{RUN}@{step} from {RUN}@{step - 1}" for step in range(first, last + 1)]


async def test_a_replica_that_was_away_for_some_versions_gets_what_it_missed() -> None:
    away, present = service(), service()
    made = images(5)
    async with fleet(away, present) as (publisher, [replica, _]):
        await publisher.publish(made[0])
        away.faults["state"] = [unavailable("away")] * 9
        for image in made[1:4]:
            assert list((await publisher.publish(image)).failures) == [replica.target]
        await publisher.ensure_current(replica.target)
        assert holds(away, made[3])
        await publisher.publish(made[4])
    assert begins(away) == [f"{RUN}@0", *chain(1, 4)]
    assert holds(away, made[4])
    assert holds(present, made[4])


async def test_a_chain_that_is_larger_than_all_weights_is_not_sent() -> None:
    away, present = service(), service()
    made = images(9, share=0.95)
    async with fleet(away, present, encoding=PushEncoding.DELTA) as (publisher, [replica, _]):
        await publisher.publish(made[0])
        away.faults["state"] = [unavailable("away")] * 24
        num_bytes = [(await publisher.publish(image)).pushed_bytes for image in made[1:]]
        assert max(num_bytes) < DENSE_BYTES <= sum(num_bytes)
        await publisher.ensure_current(replica.target)
    assert begins(away) == [f"{RUN}@0", f"{RUN}@8"]
    assert holds(away, made[8])


async def test_a_history_of_no_bytes_is_the_newest_delta_only() -> None:
    one, other = service(), service()
    made = images(4)
    async with fleet(one, other, delta_history_bytes=0) as (publisher, [replica, _]):
        await publisher.publish(made[0])
        one.faults["state"] = [unavailable("away")] * 6
        await publisher.publish(made[1])
        await publisher.publish(made[2])
        await publisher.ensure_current(replica.target)
        await publisher.publish(made[3])
    assert begins(one) == [f"{RUN}@0", f"{RUN}@2", f"{RUN}@3 from {RUN}@2"]
    assert begins(other) == [f"{RUN}@0", *chain(1, 3)]


async def test_a_restart_in_mid_chain_is_followed_by_all_weights() -> None:
    one, other = service(), service()
    made = images(4)
    async with fleet(one, other) as (publisher, [replica, _]):
        await publisher.publish(made[0])
        one.faults["state"] = [unavailable("away")] * 6
        await publisher.publish(made[1])
        await publisher.publish(made[2])
        hold = one.hold("activate")
        current = asyncio.create_task(publisher.ensure_current(replica.target))
        await one.until(lambda: one.held_at == "activate")
        one.restart()
        one.faults["activate"] = [SteersmanError(Reason.WEIGHT_PUSH_NOT_ACTIVE, "not staged")]
        hold.set()
        with pytest.raises(SteersmanError, match="not staged"):
            await current
        await publisher.ensure_current(replica.target)
    assert begins(one)[-2:] == [f"{RUN}@1 from {RUN}@0", f"{RUN}@2"]
    assert holds(one, made[2])


async def test_a_link_that_is_refused_is_followed_by_all_weights() -> None:
    one, other = service(), service()
    made = images(3)
    async with fleet(one, other) as (publisher, [replica, _]):
        await publisher.publish(made[0])
        one.faults["state"] = [unavailable("away")] * 3
        await publisher.publish(made[1])
        one.faults["state"] = [unavailable("away")] * 3
        await publisher.publish(made[2])
        one.faults["stage"] = [SteersmanError(Reason.WEIGHT_DIGEST_MISMATCH, "bits fell over")]
        await publisher.ensure_current(replica.target)
    assert begins(one) == [f"{RUN}@0", f"{RUN}@1 from {RUN}@0", f"{RUN}@2"]
    assert holds(one, made[2])


async def test_weights_of_another_attempt_are_no_start_of_a_chain() -> None:
    one = service()
    before, after = images(2, run_id="demo.1"), images(2, run_id="demo.2")
    async with serving(one) as [replica]:
        first, second = publisher_of([replica.target]), publisher_of([replica.target], run_id="demo.2")
        await first.publish(before[0])
        await second.publish(after[0])
        await second.publish(after[1])
        await first.close()
        await second.close()
    assert begins(one) == ["demo.1@0", "demo.2@0", "demo.2@1 from demo.2@0"]
    assert holds(one, after[1])


async def test_a_delta_is_encoded_once_for_all_replicas_of_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[tuple[str, str]] = []
    difference = cargo.difference

    def counted(base, new, manifest, **options):
        encoded.append((str(new.version), manifest[0].dtype))
        return difference(base, new, manifest, **options)

    monkeypatch.setattr(cargo, "difference", counted)
    fleet_of = [service(), service(), service(), service("FLOAT32")]
    made = images(3)
    async with fleet(*fleet_of) as (publisher, _):
        for image in made:
            await publisher.publish(image)
    assert sorted(encoded) == [(f"{RUN}@{step}", dtype) for step in (1, 2) for dtype in ("bfloat16", "float32")]
    assert all(holds(one, made[2]) for one in fleet_of[:3])
    assert holds(fleet_of[3], made[2], torch.float32)


async def test_a_replica_that_takes_smaller_chunks_than_a_delta_has_gets_all_weights_and_fitting_deltas_then() -> None:
    one, small = service(), service()
    small.max_chunk_bytes = 2048
    made = images(3)
    async with serving(one, small) as replicas:
        publisher = publisher_of([replicas[0].target])
        await publisher.publish(made[0])
        # It had these weights already, so nobody knows yet what it takes.
        small.active, small.digest, small.tensors = one.active, one.digest, dict(one.tensors)
        await publisher.update_targets([replica.target for replica in replicas])
        await publisher.publish(made[1])
        await publisher.publish(made[2])
        await publisher.close()
    assert begins(small) == [f"{RUN}@1 from {RUN}@0", f"{RUN}@1", f"{RUN}@2 from {RUN}@1"]
    assert small.largest_chunk <= 2048
    assert holds(small, made[2])
    assert holds(one, made[2])


async def test_the_version_that_a_quorum_did_not_take_is_no_link_of_a_chain() -> None:
    one, other = service(), service()
    made = images(3)
    async with fleet(one, other, activation="all_or_nothing", stage_timeout_seconds=30.0) as (publisher, _):
        await publisher.publish(made[0])
        one.faults["begin"] = [unavailable("away")] * 3
        with pytest.raises(SteersmanError, match="were staged by 1 of 2|were staged by 0 of 2"):
            await publisher.publish(made[1])
        await publisher.publish(made[2])
    assert begins(one)[-1] == begins(other)[-1] == f"{RUN}@2 from {RUN}@0"
    assert holds(one, made[2])
    assert holds(other, made[2])


async def test_compact_deltas_are_smaller_and_make_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(3)
    old = {name: 0.02 * torch.randn(4 * shape[0], *shape[1:], generator=generator) for name, shape in SHAPES.items()}
    # As an optimiser moves them: all by about the same, whatever their size.
    new = {name: old[name] + 3e-6 * torch.randn(old[name].shape, generator=generator) for name in old}
    num_bytes = {}
    for encoding in (PushEncoding.DELTA, PushEncoding.COMPACT):
        one = service(rows=4)
        async with fleet(one, encoding=encoding) as (publisher, _):
            await publisher.publish(WeightImage(version(0), old))
            report = await publisher.publish(WeightImage(version(1), new))
            assert report.delta_share > 0.99
            assert holds(one, WeightImage(version(1), new))
            num_bytes[encoding] = report.pushed_bytes
    assert num_bytes[PushEncoding.COMPACT] < 0.95 * num_bytes[PushEncoding.DELTA]
