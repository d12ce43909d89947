"""Deltas between versions, to services that apply them through the shared codec: the same bits, in fewer bytes."""

import pytest
import torch
from fleet_fakes import NUM_ELEMENTS, RUN, begins, fleet, holds, images, service

from steersman.trainer.weights.encode import PushEncoding
from steersman.wire.errors import Reason, SteersmanError, unavailable


async def test_after_the_first_push_only_what_changed_travels() -> None:
    one = service()
    first, second, third = images(3)
    async with fleet(one) as (publisher, _):
        dense = await publisher.publish(first)
        assert (dense.delta_share, dense.pushed_bytes) == (0.0, 2 * NUM_ELEMENTS)
        for image in (second, third):
            report = await publisher.publish(image)
            assert holds(one, image)
            assert report.delta_share > 0.99
            assert report.pushed_bytes < dense.pushed_bytes / 10
    assert begins(one) == [f"{RUN}@0", f"{RUN}@1 from {RUN}@0", f"{RUN}@2 from {RUN}@1"]


async def test_replicas_of_different_types_each_get_their_own_difference() -> None:
    wide, narrow = service("FLOAT32"), service("BFLOAT16")
    first, second = images(2)
    async with fleet(wide, narrow) as (publisher, _):
        await publisher.publish(first)
        await publisher.publish(second)
    assert holds(wide, second, torch.float32)
    assert holds(narrow, second)


async def test_where_nearly_everything_changes_everything_is_sent_and_trying_ends_early() -> None:
    one = service("FLOAT32")
    first, second = images(2, share=0.98)
    async with fleet(one) as (publisher, _):
        await publisher.publish(first)
        report = await publisher.publish(second)
    assert holds(one, second, torch.float32)
    assert report.delta_share < 0.01


async def test_delta_at_any_price_and_dense_at_any_price() -> None:
    first, second = images(2, share=0.6)
    for encoding in (PushEncoding.DELTA, PushEncoding.DENSE):
        one = service()
        async with fleet(one, encoding=encoding) as (publisher, _):
            await publisher.publish(first)
            report = await publisher.publish(second)
        assert holds(one, second)
        assert (report.delta_share > 0.99) is (encoding is PushEncoding.DELTA)
        assert begins(one)[1] == (f"{RUN}@1 from {RUN}@0" if encoding is PushEncoding.DELTA else f"{RUN}@1")


async def test_a_replica_that_restarted_between_pushes_gets_all_weights_and_the_next_one_as_a_delta() -> None:
    one, other = service(), service()
    first, second, third = images(3)
    async with fleet(one, other) as (publisher, _):
        await publisher.publish(first)
        one.restart()
        report = await publisher.publish(second)
        assert 0.4 < report.delta_share < 0.6
        await publisher.publish(third)
    assert begins(one) == [f"{RUN}@0", f"{RUN}@1", f"{RUN}@2 from {RUN}@1"]
    assert begins(other) == [f"{RUN}@0", f"{RUN}@1 from {RUN}@0", f"{RUN}@2 from {RUN}@1"]
    assert holds(one, third)
    assert holds(other, third)


async def test_a_replica_that_missed_a_version_gets_one_difference_after_the_other() -> None:
    one = service()
    first, second, third = images(3)
    async with fleet(one) as (publisher, _):
        await publisher.publish(first)
        one.faults["begin"] = [unavailable("away")] * 3
        assert (await publisher.publish(second)).failures
        await publisher.publish(third)
    assert begins(one)[-2:] == [f"{RUN}@1 from {RUN}@0", f"{RUN}@2 from {RUN}@1"]
    assert holds(one, third)


async def test_other_weights_under_the_same_version_are_no_base() -> None:
    one = service()
    first, second = images(2)
    async with fleet(one) as (publisher, _):
        await publisher.publish(first)
        one.digest = bytes(16)
        await publisher.publish(second)
    assert begins(one) == [f"{RUN}@0", f"{RUN}@1"]
    assert holds(one, second)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("begin", Reason.WEIGHT_BASE_MISMATCH),
        ("push", Reason.WEIGHT_CHUNK_INVALID),
        ("stage", Reason.WEIGHT_DIGEST_MISMATCH),
    ],
)
async def test_a_delta_that_is_refused_is_followed_by_all_weights(step: str, reason: Reason) -> None:
    one = service()
    first, second, third = images(3)
    async with fleet(one) as (publisher, _):
        await publisher.publish(first)
        one.faults[step] = [SteersmanError(reason, "not this")]
        report = await publisher.publish(second)
        assert report.failures == {}
        assert holds(one, second)
        await publisher.publish(third)
    assert begins(one) == [f"{RUN}@0", f"{RUN}@1 from {RUN}@0", f"{RUN}@1", f"{RUN}@2 from {RUN}@1"]
    assert holds(one, third)


async def test_a_service_that_never_takes_a_delta_is_offered_no_more() -> None:
    one = service()
    async with fleet(one) as (publisher, _):
        for image in images(6):
            if image.version.step in (1, 2, 3):
                one.faults["push"] = [SteersmanError(Reason.WEIGHT_CHUNK_INVALID, "no deltas here")]
            await publisher.publish(image)
            assert holds(one, image)
    assert [" from " in begun for begun in begins(one)] == [False] + [True, False] * 3 + [False] * 2


async def test_a_broken_connection_is_followed_by_another_delta() -> None:
    one = service()
    first, second = images(2)
    async with fleet(one) as (publisher, _):
        await publisher.publish(first)
        one.faults["push"] = [unavailable("connection lost")]
        await publisher.publish(second)
    assert begins(one) == [f"{RUN}@0", f"{RUN}@1 from {RUN}@0", f"{RUN}@1 from {RUN}@0"]
    assert holds(one, second)
