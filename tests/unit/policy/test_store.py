"""The weight transaction on a fake engine."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
from policy_fakes import (
    MANIFEST,
    FakeEngine,
    FakeSource,
    chunks,
    host_bytes,
    random_weights,
    slow_digest,
)

from steersman.policy.engine.port import KvCachePolicy
from steersman.policy.weights.push import Phase
from steersman.policy.weights.records import BeginRequest, Switch
from steersman.policy.weights.store import WeightStore
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.identity import WeightVersion

INITIAL = WeightVersion()
INITIAL_DIGEST = slow_digest({tensor.name: b"\7" * tensor.nbytes for tensor in MANIFEST.tensors})


def version(step: int, run_id: str = "run") -> WeightVersion:
    return WeightVersion(run_id=run_id, step=step)


def announce(step: int = 1, run_id: str = "run", **changes: object) -> BeginRequest:
    request = BeginRequest(version=version(step, run_id), tensors=MANIFEST.tensors)
    return dataclasses.replace(request, **changes)  # type: ignore[arg-type]


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def store(engine: FakeEngine) -> AsyncIterator[WeightStore]:
    store = WeightStore(engine, FakeSource(), KvCachePolicy.KEEP)
    yield store
    await store.close()


async def send(store: WeightStore, step: int, *, run_id: str = "run") -> str:
    """Begins a push of `random_weights(step)` and sends all of it."""
    push_id = await store.begin(announce(step, run_id))
    assert push_id is not None
    for chunk in chunks(random_weights(step)):
        await store.write(push_id, chunk)
    return push_id


async def stage(store: WeightStore, step: int, *, run_id: str = "run") -> str:
    push_id = await send(store, step, run_id=run_id)
    await store.stage(push_id, slow_digest(random_weights(step)))
    return push_id


async def push(store: WeightStore, step: int, *, run_id: str = "run") -> Switch:
    await stage(store, step, run_id=run_id)
    return await store.activate(version(step, run_id))


def assert_serves(store: WeightStore, expected: WeightVersion, digest: bytes) -> None:
    assert (store.active.version, store.active.digest) == (expected, digest)


@contextmanager
def refused(reason: Reason, match: str | None = None) -> Iterator[None]:
    """Expects a `SteersmanError` with this reason."""
    with pytest.raises(SteersmanError, match=match) as caught:
        yield
    assert caught.value.reason is reason


async def test_starts_with_the_checkpoint(store: WeightStore) -> None:
    assert_serves(store, INITIAL, INITIAL_DIGEST)
    assert (store.staged, store.previous, store.pushing) == (None, None, None)


async def test_a_push_reaches_the_engine(store: WeightStore, engine: FakeEngine) -> None:
    push_id = await send(store, 1)
    assert (store.pushing, store.staged) == (version(1), None)
    staged = await store.stage(push_id, slow_digest(random_weights(1)))
    assert store.staged == staged
    assert_serves(store, INITIAL, INITIAL_DIGEST)
    assert engine.loaded == host_bytes(random_weights(1))
    switch = await store.activate(version(1), KvCachePolicy.RECOMPUTE)
    assert switch.pause_s == 0.125
    assert switch.push_s is not None
    assert_serves(store, version(1), slow_digest(random_weights(1)))
    assert store.previous is not None
    assert store.previous.digest == INITIAL_DIGEST
    assert (store.staged, store.pushing) == (None, None)
    assert engine.events == ["stage", "activate", "run@1 recompute"]


async def test_the_settings_policy_is_the_default(store: WeightStore, engine: FakeEngine) -> None:
    await push(store, 1)
    assert engine.events[-1] == "run@1 keep"


async def test_pushes_follow_each_other_through_both_copies(store: WeightStore, engine: FakeEngine) -> None:
    for step in (1, 2, 3):
        await push(store, step)
        assert engine.loaded == host_bytes(random_weights(step))
        assert_serves(store, version(step), slow_digest(random_weights(step)))


async def test_staging_and_activating_again_change_nothing(store: WeightStore, engine: FakeEngine) -> None:
    push_id = await stage(store, 1)
    await store.stage(push_id, slow_digest(random_weights(1)))
    await store.activate(version(1))
    assert (await store.activate(version(1))).active == store.active
    assert engine.events == ["stage", "activate", "run@1 keep"]
    assert await store.begin(announce(1)) is None


async def test_one_version_of_two_sets_of_weights_is_noticed(store: WeightStore, engine: FakeEngine) -> None:
    await push(store, 1)
    assert await store.begin(announce(1, digest=slow_digest(random_weights(1)))) is None
    with refused(Reason.WEIGHT_VERSION_STALE, "other weights have taken this version"):
        await store.begin(announce(1, digest=slow_digest(random_weights(2))))
    with refused(Reason.INVALID_FIELD, "digest is '3 bytes', allowed: 16 bytes"):
        await store.begin(announce(2, digest=b"abc"))
    assert_serves(store, version(1), slow_digest(random_weights(1)))


async def test_an_older_step_of_the_same_run_is_refused(store: WeightStore) -> None:
    await push(store, 5)
    with refused(Reason.WEIGHT_VERSION_STALE, "run@4 is older than run@5"):
        await store.begin(announce(4))
    assert await store.begin(announce(1, "another-run"))


async def test_an_older_attempt_of_the_same_job_is_refused_whatever_its_step(store: WeightStore) -> None:
    await push(store, 3, run_id="demo.2")
    with refused(Reason.WEIGHT_VERSION_STALE, "demo.1@9 is older than demo.2@3"):
        await store.begin(announce(9, "demo.1"))
    await push(store, 1, run_id="demo.10")
    assert_serves(store, version(1, "demo.10"), slow_digest(random_weights(1)))


async def test_a_later_attempt_does_not_wait_for_the_lease_of_the_one_before(
    store: WeightStore, engine: FakeEngine
) -> None:
    await stage(store, 9, run_id="demo.1")
    push_id = await send(store, 3, run_id="demo.2")
    assert engine.events == ["stage", "discard"]
    with refused(Reason.WEIGHT_PUSH_NOT_ACTIVE, "demo.1@9 is not staged"):
        await store.activate(version(9, "demo.1"))
    with refused(Reason.WEIGHT_VERSION_STALE, "demo.1@10 is of an older attempt than demo.2@3"):
        await store.begin(announce(10, "demo.1"))
    await store.stage(push_id, slow_digest(random_weights(3)))
    assert (await store.activate(version(3, "demo.2"))).active.version == version(3, "demo.2")


@pytest.mark.parametrize("run_id", ["", "x" * 129, "a\nb"])
async def test_a_bad_run_id_is_refused(store: WeightStore, run_id: str) -> None:
    with refused(Reason.INVALID_FIELD, "run_id"):
        await store.begin(announce(1, run_id))


@pytest.mark.parametrize("seconds", [0.5, 3601.0, float("nan")])
async def test_a_bad_idle_timeout_is_refused(store: WeightStore, seconds: float) -> None:
    with refused(Reason.INVALID_FIELD, "idle_timeout"):
        await store.begin(announce(idle_timeout_s=seconds))


async def test_a_wrong_manifest_never_opens_a_push(store: WeightStore, engine: FakeEngine) -> None:
    with refused(Reason.WEIGHT_MANIFEST_MISMATCH, "is missing"):
        await store.begin(announce(tensors=MANIFEST.tensors[1:]))
    assert store.pushing is None
    assert engine.events == []


async def test_another_run_waits_until_the_lease_ends(
    store: WeightStore, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_id = await send(store, 1)
    with refused(Reason.WEIGHT_PUSH_IN_PROGRESS, "'run' is pushing run@1"):
        await store.begin(announce(1, "other"))
    now = [store._push.touched + 61]  # type: ignore[union-attr]
    monkeypatch.setattr("steersman.policy.weights.push.time.monotonic", lambda: now[0])
    assert store.pushing is None
    with refused(Reason.WEIGHT_PUSH_NOT_ACTIVE, "expired"):
        await store.stage(push_id, slow_digest(random_weights(1)))
    assert await store.begin(announce(1, "other"))
    assert engine.events == ["discard"]


async def test_chunks_renew_the_lease(store: WeightStore, monkeypatch: pytest.MonkeyPatch) -> None:
    push_id = await store.begin(announce(idle_timeout_s=10))
    assert push_id is not None
    now = [store._push.touched]  # type: ignore[union-attr]
    monkeypatch.setattr("steersman.policy.weights.push.time.monotonic", lambda: now[0])
    for chunk in chunks(random_weights(1)):
        now[0] += 9
        await store.write(push_id, chunk)
    assert store.pushing == version(1)


async def test_the_same_run_takes_its_own_push_over(store: WeightStore) -> None:
    old = await send(store, 1)
    new = await store.begin(announce(1))
    assert new != old
    with refused(Reason.WEIGHT_PUSH_NOT_ACTIVE):
        await store.write(old, chunks(random_weights(1))[0])
    await push(store, 2)
    assert_serves(store, version(2), slow_digest(random_weights(2)))


async def test_a_push_taken_over_after_staging_leaves_nothing_behind(store: WeightStore, engine: FakeEngine) -> None:
    await stage(store, 1)
    await push(store, 2)
    assert engine.events == ["stage", "discard", "stage", "activate", "run@2 keep"]
    assert engine.loaded == host_bytes(random_weights(2))


async def test_incomplete_weights_are_refused_and_may_be_completed(store: WeightStore) -> None:
    push_id = await store.begin(announce(1))
    assert push_id is not None
    *most, last = chunks(random_weights(1))
    for chunk in most:
        await store.write(push_id, chunk)
    with refused(Reason.WEIGHTS_INCOMPLETE, r"c\.scale"):
        await store.stage(push_id, slow_digest(random_weights(1)))
    await store.write(push_id, last)
    await store.stage(push_id, slow_digest(random_weights(1)))


async def test_a_wrong_digest_ends_the_push(store: WeightStore, engine: FakeEngine) -> None:
    push_id = await send(store, 1)
    with refused(Reason.WEIGHT_DIGEST_MISMATCH):
        await store.stage(push_id, slow_digest(random_weights(2)))
    assert store.pushing is None
    assert_serves(store, INITIAL, INITIAL_DIGEST)
    assert engine.events == ["discard"]
    with refused(Reason.INVALID_FIELD, "16 bytes"):
        await store.stage(push_id, b"short")


@pytest.mark.parametrize("step", ["stage", "activate"])
async def test_an_engine_that_refuses_leaves_the_old_weights(store: WeightStore, engine: FakeEngine, step: str) -> None:
    await push(store, 1)
    engine.failing.add(step)
    with refused(Reason.WEIGHT_ACTIVATION_FAILED, "serves on"):
        await push(store, 2)
    assert_serves(store, version(1), slow_digest(random_weights(1)))
    assert (store.pushing, store.staged) == (None, None)
    engine.failing.clear()
    await push(store, 2)
    assert_serves(store, version(2), slow_digest(random_weights(2)))


async def test_a_dead_engine_is_said_to_be_unavailable(store: WeightStore, engine: FakeEngine) -> None:
    push_id = await send(store, 1)
    engine.dead = True
    with refused(Reason.ENGINE_UNAVAILABLE):
        await store.stage(push_id, slow_digest(random_weights(1)))
    assert_serves(store, INITIAL, INITIAL_DIGEST)


async def test_only_what_is_staged_can_be_activated(store: WeightStore) -> None:
    with refused(Reason.WEIGHT_PUSH_NOT_ACTIVE, "staged is nothing"):
        await store.activate(version(1))
    await stage(store, 1)
    with refused(Reason.WEIGHT_PUSH_NOT_ACTIVE, "staged is run@1"):
        await store.activate(version(2))


async def test_abort_gives_the_replica_free(store: WeightStore, engine: FakeEngine) -> None:
    push_id = await stage(store, 1)
    await store.abort(push_id)
    assert (store.pushing, store.staged) == (None, None)
    assert engine.events == ["stage", "discard"]
    with refused(Reason.WEIGHT_PUSH_NOT_ACTIVE):
        await store.abort(push_id)
    await push(store, 1, run_id="other")


async def test_rollback_returns_and_can_be_undone(store: WeightStore, engine: FakeEngine) -> None:
    await push(store, 1)
    await push(store, 2)
    await store.rollback(version(1))
    assert_serves(store, version(1), slow_digest(random_weights(1)))
    assert engine.loaded == host_bytes(random_weights(1))
    assert (await store.rollback(version(1))).active == store.active
    await store.rollback(version(2))
    assert_serves(store, version(2), slow_digest(random_weights(2)))


async def test_there_is_no_way_back_further_or_after_a_new_push_began(store: WeightStore) -> None:
    await push(store, 1)
    await push(store, 2)
    with refused(Reason.WEIGHT_VERSION_STALE, "previous is run@1"):
        await store.rollback(INITIAL)
    await store.begin(announce(3))
    with refused(Reason.WEIGHT_VERSION_STALE, "previous is nothing"):
        await store.rollback(version(1))
    assert_serves(store, version(2), slow_digest(random_weights(2)))


async def test_a_failed_rollback_keeps_the_state(store: WeightStore, engine: FakeEngine) -> None:
    await push(store, 1)
    engine.failing.add("rollback")
    with refused(Reason.WEIGHT_ACTIVATION_FAILED):
        await store.rollback(INITIAL)
    assert_serves(store, version(1), slow_digest(random_weights(1)))
    assert store.previous is not None


async def test_a_partial_push_keeps_what_it_does_not_send(store: WeightStore, engine: FakeEngine) -> None:
    await push(store, 1)
    expected = random_weights(1) | {"c.scale": random_weights(2)["c.scale"]}
    push_id = await store.begin(announce(2, partial=True, base_version=version(1)))
    assert push_id is not None
    await store.write(push_id, chunks(random_weights(2))[-1])
    await store.stage(push_id, slow_digest(expected))
    await store.activate(version(2))
    assert engine.loaded == host_bytes(expected)


async def test_a_partial_push_needs_the_base_that_is_active(store: WeightStore) -> None:
    with refused(Reason.INVALID_FIELD, "base_version"):
        await store.begin(announce(partial=True))
    with refused(Reason.WEIGHT_BASE_MISMATCH, "active is initial"):
        await store.begin(announce(partial=True, base_version=version(9)))


async def test_a_caller_that_goes_away_does_not_stop_the_staging(store: WeightStore, engine: FakeEngine) -> None:
    push_id = await send(store, 1)
    engine.hold_stage.clear()
    caller = asyncio.create_task(store.stage(push_id, slow_digest(random_weights(1))))
    while store._push is None or store._push.phase is not Phase.VERIFYING:
        await asyncio.sleep(0)
    with refused(Reason.WEIGHT_PUSH_NOT_ACTIVE):
        await store.write(push_id, chunks(random_weights(1))[0])
    caller.cancel()
    await asyncio.wait([caller])
    engine.hold_stage.set()
    await store.activate(version(1))
    assert_serves(store, version(1), slow_digest(random_weights(1)))
