"""The publisher against weight services behind real servers: every replica gets the wanted weights, whatever breaks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch
from fake_weight_service import FakeWeightService, Replica, manifest
from torch import nn

from steersman.client import AsyncWeightClient, ChannelSettings
from steersman.trainer.weights.image import WeightImage
from steersman.trainer.weights.ports import WeightsRefused
from steersman.trainer.weights.publisher import Publisher
from steersman.wire.errors import Reason, SteersmanError, unavailable
from steersman.wire.identity import WeightVersion

RUN = "demo.1"


class Tied(nn.Module):
    """Two names for one tensor, as in a model whose head is its embedding."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(50, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight


def service(dtype: str = "FLOAT32") -> FakeWeightService:
    specs = {"embed.weight": ((50, 8), dtype), "middle.weight": ((8, 8), dtype), "middle.bias": ((8,), dtype)}
    return FakeWeightService(manifest(specs))


def image(seed: int, step: int, run_id: str = RUN) -> WeightImage:
    return WeightImage.of(Tied(seed), WeightVersion(run_id=run_id, step=step))


async def no_sleep(_: float) -> None:
    await asyncio.sleep(0)


@asynccontextmanager
async def fleet(*services: FakeWeightService, run_id: str = RUN) -> AsyncIterator[tuple[Publisher, list[Replica]]]:
    replicas = [Replica(one) for one in services]
    for replica in replicas:
        await replica.start()
    once = ChannelSettings(retry_attempts=1, max_reconnect_seconds=0.2)

    def connect(target: str) -> AsyncWeightClient:
        return AsyncWeightClient(target, settings=once, timeout=10.0)

    publisher = Publisher(connect, targets=[one.target for one in replicas], run_id=run_id, sleep=no_sleep)
    try:
        async with asyncio.timeout(60):
            yield publisher, replicas
    finally:
        await publisher.close()
        for replica in replicas:
            await replica.stop()


def bytes_of(model: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> bytes:
    return model.state_dict()[name].to(dtype).contiguous().view(torch.uint8).numpy().tobytes()


async def test_a_push_is_one_transaction_and_leaves_the_weights_bit_by_bit() -> None:
    async with fleet(service()) as (publisher, [replica]):
        report = await publisher.publish(image(seed=1, step=0))
    got = replica.service
    assert got.events == [f"begin {RUN}@0", "push", "stage", f"activate {RUN}@0"]
    assert got.active == WeightVersion(run_id=RUN, step=0)
    model = Tied(1)
    assert got.tensors == {name: bytes_of(model, name) for name in ("embed.weight", "middle.bias", "middle.weight")}
    assert got.largest_chunk == 256  # what the replica allows, although the publisher would send more
    assert report.pushed_bytes == 4 * (50 * 8 + 8 * 8 + 8)  # the tied tensor once
    assert report.failures == {}


async def test_replicas_of_different_types_get_the_same_weights_rounded() -> None:
    async with fleet(service("FLOAT32"), service("BFLOAT16")) as (publisher, replicas):
        await publisher.publish(image(seed=1, step=0))
    model = Tied(1)
    assert replicas[0].service.tensors["embed.weight"] == bytes_of(model, "embed.weight")
    assert replicas[1].service.tensors["embed.weight"] == bytes_of(model, "embed.weight", torch.bfloat16)


async def test_an_image_does_not_follow_the_model() -> None:
    model = Tied(1)
    before = WeightImage.of(model, WeightVersion(run_id=RUN, step=0))
    expected = bytes_of(model, "embed.weight")
    with torch.no_grad():
        model.embed.weight.add_(1.0)
    async with fleet(service()) as (publisher, [replica]):
        await publisher.publish(before)
    assert replica.service.tensors["embed.weight"] == expected


@pytest.mark.parametrize("step", ["begin", "push", "stage", "activate"])
async def test_a_push_that_breaks_is_made_again(step: str) -> None:
    broken = service()
    broken.faults[step] = [unavailable("connection lost")]
    async with fleet(broken) as (publisher, [replica]):
        report = await publisher.publish(image(seed=1, step=0))
    assert report.failures == {}
    assert replica.service.active == WeightVersion(run_id=RUN, step=0)


async def test_staged_weights_are_activated_without_sending_them_again() -> None:
    one = service()
    one.faults["activate"] = [unavailable("connection lost")]
    async with fleet(one) as (publisher, _):
        await publisher.publish(image(seed=1, step=0))
    assert one.events == [f"begin {RUN}@0", "push", "stage", f"activate {RUN}@0", f"activate {RUN}@0"]


async def test_a_wrong_digest_is_no_end() -> None:
    one = service()
    one.faults["stage"] = [SteersmanError(Reason.WEIGHT_DIGEST_MISMATCH, "bits fell over")]
    async with fleet(one) as (publisher, _):
        await publisher.publish(image(seed=1, step=0))
    assert one.events == [
        f"begin {RUN}@0",
        "push",
        "stage",
        "abort",
        f"begin {RUN}@0",
        "push",
        "stage",
        f"activate {RUN}@0",
    ]


async def test_a_replica_that_is_down_does_not_hold_up_the_others() -> None:
    async with fleet(service(), service()) as (publisher, replicas):
        await replicas[0].stop()
        report = await publisher.publish(image(seed=1, step=0))
        assert list(report.failures) == [replicas[0].target]
        assert replicas[1].service.active == WeightVersion(run_id=RUN, step=0)
        with pytest.raises(SteersmanError):
            await publisher.ensure_current(replicas[0].target)
        await replicas[0].start()
        await _until_current(publisher, replicas[0].target)
    assert replicas[0].service.active == WeightVersion(run_id=RUN, step=0)


async def test_a_replica_that_restarted_is_repaired_and_one_that_is_current_left_alone() -> None:
    async with fleet(service(), service()) as (publisher, replicas):
        await publisher.publish(image(seed=1, step=0))
        await publisher.publish(image(seed=2, step=1))
        replicas[0].service.restart()
        num_events = len(replicas[1].service.events)
        assert (await publisher.reconcile()).failures == {}
    assert replicas[0].service.active == replicas[1].service.active == WeightVersion(run_id=RUN, step=1)
    assert replicas[0].service.tensors["embed.weight"] == bytes_of(Tied(2), "embed.weight")
    assert len(replicas[1].service.events) == num_events


async def test_a_push_of_somebody_else_is_waited_out() -> None:
    one = service()
    held = SteersmanError(Reason.WEIGHT_PUSH_IN_PROGRESS, "another push holds the replica")
    one.faults["begin"] = [held, held]
    async with fleet(one) as (publisher, _):
        assert (await publisher.publish(image(seed=1, step=0))).failures == {}


async def test_a_resumed_trainer_makes_the_same_step_again_under_another_run_id() -> None:
    one = service()
    async with fleet(one) as (publisher, replicas):
        for step in range(3):
            await publisher.publish(image(seed=step, step=step))
        targets = [replicas[0].target]
        resumed = Publisher(AsyncWeightClient, targets=targets, run_id="demo.2", sleep=no_sleep)
        same = Publisher(AsyncWeightClient, targets=targets, run_id="demo.2", sleep=no_sleep)
        try:
            await resumed.publish(image(seed=7, step=1, run_id="demo.2"))
            assert one.active == WeightVersion(run_id="demo.2", step=1)
            assert one.tensors["embed.weight"] == bytes_of(Tied(7), "embed.weight")
            # Had it kept the run id, the replica would have refused, and the trainer must hear of it.
            with pytest.raises(WeightsRefused, match="WEIGHT_VERSION_STALE"):
                await same.publish(image(seed=8, step=0, run_id="demo.2"))
        finally:
            await resumed.close()
            await same.close()


async def test_other_weights_under_our_version_are_not_taken_for_ours() -> None:
    one = service()
    async with fleet(one) as (publisher, replicas):
        await publisher.publish(image(seed=1, step=0))
        one.digest = bytes(16)
        with pytest.raises(WeightsRefused, match=r"serves other weights as demo\.1@0 \(digest 0{32}"):
            await publisher.ensure_current(replicas[0].target)


async def test_another_model_is_refused_before_anything_is_sent() -> None:
    other = FakeWeightService(manifest({"embed.weight": ((50, 9), "FLOAT32")}))
    async with fleet(other) as (publisher, _):
        with pytest.raises(WeightsRefused, match=r"'embed.weight' has shape \(50, 9\) at the replica and \(50, 8\)"):
            await publisher.publish(image(seed=1, step=0))
    assert other.events == []


async def test_versions_of_another_run_and_of_the_past_are_not_published() -> None:
    publisher = Publisher(AsyncWeightClient, run_id=RUN)
    with pytest.raises(ValueError, match=r"must be of run demo\.1"):
        await publisher.publish(image(seed=1, step=0, run_id="else.1"))
    await publisher.publish(image(seed=1, step=3))
    with pytest.raises(ValueError, match=r"after demo\.1@3"):
        await publisher.publish(image(seed=1, step=3))


async def _until_current(publisher: Publisher, target: str) -> None:
    while True:
        try:
            return await publisher.ensure_current(target)
        except SteersmanError:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("version", "oldest_step", "accepted"),
    [
        (WeightVersion(run_id=RUN, step=5), 5, True),
        (WeightVersion(run_id=RUN, step=4), 5, False),
        (WeightVersion(run_id=RUN, step=4), 4, True),
        (WeightVersion(run_id=RUN, step=3), 4, False),
        (WeightVersion(run_id=RUN, step=5), 7, False),
        (WeightVersion(run_id=RUN, step=6), 4, False),
        (WeightVersion(run_id="demo.2", step=5), 4, False),
        (WeightVersion(), 0, False),
    ],
)
async def test_which_weights_may_be_trained_on(version: WeightVersion, oldest_step: int, accepted: bool) -> None:
    publisher = Publisher(AsyncWeightClient, run_id=RUN)
    assert not publisher.accepts(version.run_id, version.step, oldest_step=oldest_step)
    await publisher.publish(image(seed=1, step=5))
    assert publisher.accepts(version.run_id, version.step, oldest_step=oldest_step) is accepted
