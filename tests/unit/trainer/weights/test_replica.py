"""Transactions with one replica: who waits, and how they end."""

import asyncio

import pytest
import torch

from steersman.client.types import KvCachePolicy, Push, TensorSpec, WeightSnapshot, WeightState
from steersman.trainer.weights.cargo import Cargo
from steersman.trainer.weights.delivery import Delivered, Recipient
from steersman.trainer.weights.encode import PushEncoding
from steersman.trainer.weights.history import DeltaHistory
from steersman.trainer.weights.image import WeightImage
from steersman.trainer.weights.ports import WeightsRefused
from steersman.trainer.weights.replica import Replica
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.identity import WeightVersion

IMAGE = WeightImage(WeightVersion(run_id="demo.1", step=1), {"w": torch.zeros(4)})
MANIFEST = (TensorSpec(name="w", shape=(4,), dtype="float32"),)


class Port:
    """A replica that takes a push, and answers an abort when it is let."""

    target = "policy-0"

    def __init__(self) -> None:
        self.events: list[str] = []
        self.may_abort = asyncio.Event()

    async def state(self, **_) -> WeightState:
        active = WeightSnapshot(version=WeightVersion(), digest=b"")
        return WeightState(active=active, staged=None, previous=None, pushing=None, manifest=MANIFEST, total_bytes=16)

    async def begin(self, version: WeightVersion, manifest, **_) -> Push:
        self.events.append("begin")
        return Push(push_id="p1", max_chunk_bytes=4096, already_active=False)

    async def abort(self, push_id: str) -> None:
        self.events.append("abort")
        await self.may_abort.wait()
        self.events.append("aborted")

    async def close(self) -> None:
        self.events.append("close")


async def stuck(cargo: Cargo, recipient: Recipient) -> Delivered:
    await asyncio.Event().wait()
    raise AssertionError


def replica(port: Port) -> Replica:
    history = DeltaHistory(PushEncoding.DENSE, max_bytes=0)
    return Replica(port, stuck, history, kv_cache=KvCachePolicy.KEEP, lease_seconds=20.0)


async def stage(one: Replica) -> None:
    async with one.transaction(IMAGE):
        await one.stage(IMAGE)


async def until(port: Port, event: str) -> None:
    async with asyncio.timeout(30):
        while event not in port.events:
            await asyncio.sleep(0)


async def test_a_transaction_that_is_stopped_aborts_its_push_and_may_be_tried_again() -> None:
    port = Port()
    one = replica(port)
    staging = asyncio.create_task(stage(one))
    await until(port, "begin")
    assert one.image is IMAGE
    one.stop()
    await until(port, "abort")
    one.stop()  # again, while it ends
    port.may_abort.set()
    with pytest.raises(SteersmanError, match="given up for a newer one") as caught:
        await staging
    assert caught.value.reason is Reason.ENGINE_UNAVAILABLE
    assert one.image is None
    one.stop()
    assert port.events == ["begin", "abort", "aborted"]


async def test_one_transaction_at_a_time() -> None:
    port = Port()
    port.may_abort.set()
    one = replica(port)
    first, second = asyncio.create_task(stage(one)), asyncio.create_task(stage(one))
    await until(port, "begin")
    await asyncio.sleep(0)
    assert port.events == ["begin"]
    one.stop()
    while port.events.count("begin") < 2:
        await asyncio.sleep(0)
    assert port.events == ["begin", "abort", "aborted", "begin"]
    one.stop()
    assert [type(error) for error in await asyncio.gather(first, second, return_exceptions=True)] == [
        SteersmanError
    ] * 2


async def test_closing_ends_what_is_under_way_first_and_refuses_the_rest() -> None:
    port = Port()
    one = replica(port)
    first = asyncio.create_task(stage(one))
    await until(port, "begin")
    second = asyncio.create_task(stage(one))
    first.cancel()
    await until(port, "abort")
    closing = asyncio.create_task(one.close())
    await asyncio.sleep(0)
    assert "close" not in port.events
    port.may_abort.set()
    await closing
    assert port.events == ["begin", "abort", "aborted", "close"]
    with pytest.raises(SteersmanError, match="policy-0 is no replica any more"):
        await second
    await asyncio.gather(first, return_exceptions=True)


async def test_refusals_for_good_are_told_from_those_that_another_try_mends() -> None:
    one = replica(Port())
    with pytest.raises(WeightsRefused, match=r"policy-0 refuses demo\.1@1: WEIGHT_VERSION_STALE: older"):
        async with one.transaction(IMAGE):
            raise SteersmanError(Reason.WEIGHT_VERSION_STALE, "older")
    with pytest.raises(SteersmanError, match="DIGEST"):
        async with one.transaction(IMAGE):
            raise SteersmanError(Reason.WEIGHT_DIGEST_MISMATCH, "bits")
