"""Pushes whose chunks, manifests or bases are wrong, and replicas that are slow, stand still or lack memory."""

import asyncio
import signal
from collections.abc import Iterator

import pytest
from tiny_fleet import WAIT_S, Fleet, Trainer
from tiny_models import save_model

from steersman.client.policy import AsyncPolicyClient
from steersman.client.weights import AsyncWeightClient
from steersman.wire.errors import Reason, SteersmanError

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK = 8
"""In the middle: a push has some twenty."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    model = tmp_path_factory.mktemp("model")
    save_model("llama", model, 0)
    with Fleet(model, tmp_path_factory.mktemp("gates"), num_replicas=2) as fleet:
        yield fleet


# What the replica says, of a push of all weights and of a delta.
REFUSALS = {
    "flip": [("push", "WEIGHT_CHUNK_INVALID")],  # the checksum of the chunk
    "forge": [("stage", "WEIGHT_DIGEST_MISMATCH")],  # right by its checksum; the digest of the whole
    "double": [("push", "WEIGHT_CHUNK_INVALID")],
    "lose": [("stage", "WEIGHTS_INCOMPLETE")],
    "swap": [],  # chunks say where they belong
}


@pytest.mark.parametrize("kind", REFUSALS)
async def test_chunks_that_are_not_as_they_were_sent(fleet: Fleet, kind: str) -> None:
    disturbed, other = fleet.targets
    fault = {"target": disturbed, "call": "push", "kind": kind, "chunk": CHUNK}
    expected = REFUSALS[kind]
    async with Trainer.of(fleet, f"{kind}.1", push_attempts=2) as trainer:
        assert (await trainer.publish(1, [fault]))["failures"] == {}
        assert trainer.errors(disturbed) == expected
        await fleet.assert_serves(trainer.version(1), disturbed)
        # As a delta: refused at once, and all weights instead.
        assert (await trainer.publish(2, [fault]))["failures"] == {}
        assert trainer.errors(disturbed)[len(expected) :] == expected
        await fleet.assert_serves(trainer.version(2), disturbed)
        # Whatever is sent: the replica stays at the version before, to the bit, until it gets what was meant.
        report = await trainer.publish(3, [fault | {"times": 10}])
        if kind == "swap":
            assert report["failures"] == {}
        else:
            assert list(report["failures"]) == [disturbed]
            await fleet.assert_serves(trainer.version(2), disturbed)
        await fleet.assert_serves(trainer.version(3), other)
        assert (await trainer.publish(4))["failures"] == {}
        await fleet.assert_serves(trainer.version(4), *fleet.targets)
        assert trainer.errors(other) == []


async def test_a_delta_to_a_version_that_is_gone(fleet: Fleet) -> None:
    surprised, other = fleet.targets
    async with Trainer.of(fleet, "base.1") as trainer:
        await trainer.publish(1)
        await trainer.publish(2)
        await trainer.tell("publish", step=3, faults=[{"target": surprised, "call": "begin", "kind": "hold"}])
        await trainer.expect("held", target=surprised)
        async with AsyncWeightClient(surprised) as operator:
            await operator.rollback(trainer.version(1))
        await fleet.assert_serves(trainer.version(1), surprised)
        await trainer.tell("go")
        assert (await trainer.expect("published"))["failures"] == {}
        assert trainer.errors(surprised) == [("begin", "WEIGHT_BASE_MISMATCH")]
        begun = [event for event in trainer.events if event["event"] == "begins" and event["target"] == surprised]
        assert [event["base"] for event in begun[-2:]] == [str(trainer.version(2)), None]
        await fleet.assert_serves(trainer.version(3), surprised, other)


async def test_a_manifest_of_another_model(fleet: Fleet) -> None:
    asked, other = fleet.targets
    async with Trainer.of(fleet, "manifest.1") as trainer:
        await trainer.publish(1)
        await trainer.tell("publish", step=2, faults=[{"target": asked, "call": "begin", "kind": "reshape"}])
        error = await trainer.expect("error", target=asked)
        assert error["reason"] == "WEIGHT_MANIFEST_MISMATCH"
        refused = await trainer.expect("refused")
        assert asked in refused["message"]
        state = await fleet.state(asked)
        assert (state.pushing, state.staged) == (None, None)
        await fleet.assert_serves(trainer.version(1), asked)
    async with Trainer.of(fleet, "manifest.2") as successor:
        assert (await successor.publish(2))["failures"] == {}
        await fleet.assert_serves(successor.version(2), asked, other)


async def test_a_trainer_of_another_model(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> None:
    stranger = tmp_path_factory.mktemp("stranger")
    save_model("qwen2", stranger, 0)
    async with Trainer.of(fleet, "native.1") as trainer:
        await trainer.publish(1)
        async with Trainer.of(fleet, "stranger.1", model=str(stranger)) as other:
            await other.tell("publish", step=1)
            assert "serves another model" in (await other.expect("refused"))["message"]
        await fleet.assert_serves(trainer.version(1), *fleet.targets)
        assert (await trainer.publish(2))["failures"] == {}
        await fleet.assert_serves(trainer.version(2), *fleet.targets)


async def test_a_slow_replica(fleet: Fleet) -> None:
    slow, other = fleet.targets
    async with Trainer.of(fleet, "slow.1", stage_timeout_seconds=3.0) as trainer:
        await trainer.publish(1)
        fleet.shut(slow, "stage")
        report = await trainer.publish(2)
        assert report["failures"] == {slow: "has not staged in time"}
        await fleet.assert_serves(trainer.version(1), slow)  # it generates meanwhile
        await fleet.assert_serves(trainer.version(2), other)
        fleet.open(slow, "stage")
        await trainer.ensure(slow)
        await fleet.assert_serves(trainer.version(2), slow)


async def test_a_replica_that_stands_still(fleet: Fleet) -> None:
    stuck, other = fleet.targets
    async with Trainer.of(fleet, "stuck.1", stage_timeout_seconds=3.0) as trainer:
        await trainer.publish(1)
        async with AsyncPolicyClient(stuck) as client:
            hold = {"target": stuck, "call": "push", "kind": "hold", "chunk": CHUNK}
            await trainer.tell("publish", step=2, faults=[hold])
            await trainer.expect("held", target=stuck)
            fleet.kill(stuck, signal.SIGSTOP)
            try:
                await trainer.tell("go")
                report = await trainer.expect("published")
                assert report["failures"] == {stuck: "has not staged in time"}
                await fleet.assert_serves(trainer.version(2), other)
                with pytest.raises(SteersmanError) as caught:
                    await client.generate([5], max_tokens=2, timeout=0.5)
                assert caught.value.reason in (Reason.DEADLINE_EXCEEDED, None)
            finally:
                fleet.kill(stuck, signal.SIGCONT)
        await trainer.ensure(stuck)
        await fleet.assert_serves(trainer.version(2), stuck, other)


async def test_a_replica_without_memory_for_new_weights(fleet: Fleet) -> None:
    starved, other = fleet.targets
    async with Trainer.of(fleet, "starved.1", push_attempts=2) as trainer:
        await trainer.publish(1)
        async with AsyncPolicyClient(starved) as client:
            running = asyncio.create_task(client.generate([5, 6], max_tokens=400, ignore_eos=True, timeout=WAIT_S))
            fleet.shut(starved, "starve")
            report = await trainer.publish(2)
            await fleet.entered(starved, "starve")
            assert list(report["failures"]) == [starved]
            assert trainer.errors(starved) == [("stage", "WEIGHT_ACTIVATION_FAILED")] * 2
            await fleet.assert_serves(trainer.version(1), starved)
            await fleet.assert_serves(trainer.version(2), other)
            (sample,) = await running
        fleet.assert_drawn_from([trainer.version(1)], [5, 6], sample)
        fleet.open(starved, "starve")
        await trainer.ensure(starved)
        await fleet.assert_serves(trainer.version(2), starved)
