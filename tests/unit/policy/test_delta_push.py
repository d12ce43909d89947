"""Pushes of sparse deltas: the same result as a dense push, or none at all."""

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator

import pytest
from delta_fakes import (
    MANIFEST,
    DeltaSource,
    Weights,
    chunk_of,
    contract_digest,
    deltas,
    dense,
    host_bytes,
    start,
    stepped,
)
from policy_fakes import FakeEngine

from steersman.policy.engine.port import KvCachePolicy
from steersman.policy.weights.records import BeginRequest
from steersman.policy.weights.store import WeightStore
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.identity import WeightVersion
from steersman.wire.weights.chunks import DeltaOptions, Encoding
from steersman.wire.weights.delta import Profile
from steersman.wire.weights.messages import Chunk

BASE = start()
NEW = stepped(BASE, 1)
INITIAL = WeightVersion()


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def store(engine: FakeEngine) -> AsyncIterator[WeightStore]:
    store = WeightStore(engine, DeltaSource(), KvCachePolicy.KEEP)
    yield store
    await store.close()


def version(step: int) -> WeightVersion:
    return WeightVersion(run_id="run", step=step)


async def begin(store: WeightStore, step: int, base: WeightVersion | None = INITIAL, *, partial: bool = False) -> str:
    request = BeginRequest(version=version(step), tensors=MANIFEST.tensors, base_version=base, partial=partial)
    push_id = await store.begin(request)
    assert push_id is not None
    return push_id


async def push(store: WeightStore, step: int, chunks: list[Chunk], digest: bytes, base: WeightVersion | None) -> None:
    push_id = await begin(store, step, base)
    for chunk in chunks:
        await store.write(push_id, chunk)
    await store.stage(push_id, digest)
    await store.activate(version(step))


def large_delta() -> Chunk:
    """A delta of the whole embedding, which is applied in a thread."""
    found = deltas(BASE, NEW)[0]
    assert (found.encoding, found.num_elements) == (Encoding.SPARSE_DELTA, 300_000)
    return found


@pytest.mark.parametrize("profile", list(Profile))
async def test_deltas_after_deltas_give_what_dense_pushes_give(
    store: WeightStore, engine: FakeEngine, profile: Profile
) -> None:
    old, base = BASE, INITIAL
    for step in (1, 2, 3):
        new: Weights = stepped(old, step)
        chunks = deltas(old, new, DeltaOptions(profile=profile))
        assert {chunk.encoding for chunk in chunks} == {Encoding.DENSE, Encoding.SPARSE_DELTA}
        assert sum(len(chunk.data) for chunk in chunks) < MANIFEST.total_bytes / 3
        random.Random(step).shuffle(chunks)
        await push(store, step, chunks, contract_digest(new), base)
        assert engine.loaded == host_bytes(new)
        old, base = new, version(step)
    await push(store, 4, dense(old), contract_digest(old), None)
    assert engine.loaded == host_bytes(old)


async def test_chunks_of_several_streams_are_applied_side_by_side(store: WeightStore, engine: FakeEngine) -> None:
    push_id = await begin(store, 1)
    chunks = deltas(BASE, NEW, DeltaOptions(max_chunk_bytes=4096))
    await asyncio.gather(*(store.write(push_id, chunk) for chunk in chunks))
    await store.stage(push_id, contract_digest(NEW))
    assert engine.loaded == host_bytes(NEW)


async def test_a_partial_push_keeps_the_base_elsewhere(store: WeightStore, engine: FakeEngine) -> None:
    push_id = await begin(store, 1, partial=True)
    await store.write(push_id, large_delta())
    expected = BASE | {"embed": NEW["embed"]}
    await store.stage(push_id, contract_digest(expected))
    assert engine.loaded == host_bytes(expected)


async def test_a_delta_needs_a_base(store: WeightStore) -> None:
    push_id = await begin(store, 1, None)
    with pytest.raises(SteersmanError, match="the push names no base_version") as caught:
        await store.write(push_id, large_delta())
    assert caught.value.reason is Reason.WEIGHT_CHUNK_INVALID


async def test_the_base_is_the_active_version_and_no_other(store: WeightStore) -> None:
    await push(store, 1, dense(NEW), contract_digest(NEW), None)
    for base in (INITIAL, version(9)):
        with pytest.raises(SteersmanError) as caught:
            await begin(store, 2, base)
        assert caught.value.reason is Reason.WEIGHT_BASE_MISMATCH


@pytest.mark.parametrize("data", [b"", b"\1", large_delta().data[:-1], b"\7" + large_delta().data[1:]])
async def test_a_malformed_delta_leaves_no_trace(store: WeightStore, engine: FakeEngine, data: bytes) -> None:
    push_id = await begin(store, 1)
    good, *others = deltas(BASE, NEW)
    with pytest.raises(SteersmanError) as caught:
        await store.write(push_id, chunk_of(0, 0, good.num_elements, data))
    assert caught.value.reason is Reason.WEIGHT_CHUNK_INVALID
    assert (store.active.version, engine.events) == (INITIAL, [])
    for chunk in (good, *others):  # its place is still free
        await store.write(push_id, chunk)
    await store.stage(push_id, contract_digest(NEW))
    assert engine.loaded == host_bytes(NEW)


async def test_a_flipped_bit_is_found_by_the_checksum(store: WeightStore) -> None:
    push_id = await begin(store, 1)
    good = large_delta()
    flipped = bytearray(good.data)
    flipped[len(flipped) // 2] ^= 1
    with pytest.raises(SteersmanError) as caught:
        await store.write(push_id, dataclasses.replace(good, data=bytes(flipped)))
    assert caught.value.violations[0].field == "chunk.checksum"


async def test_a_doubled_delta_is_refused_even_while_the_first_is_applied(
    store: WeightStore, engine: FakeEngine
) -> None:
    push_id = await begin(store, 1)
    doubled, *others = deltas(BASE, NEW)
    first, second = await asyncio.gather(
        store.write(push_id, doubled), store.write(push_id, doubled), return_exceptions=True
    )
    assert first is None
    assert isinstance(second, SteersmanError)
    assert second.violations[0].field == "chunk.element_offset"
    for chunk in others:
        await store.write(push_id, chunk)
    await store.stage(push_id, contract_digest(NEW))
    assert engine.loaded == host_bytes(NEW)


async def test_a_delta_of_another_base_is_found_by_the_digest(store: WeightStore, engine: FakeEngine) -> None:
    push_id = await begin(store, 1)
    for chunk in deltas(NEW, stepped(NEW, 2)):
        await store.write(push_id, chunk)
    with pytest.raises(SteersmanError) as caught:
        await store.stage(push_id, contract_digest(stepped(NEW, 2)))
    assert caught.value.reason is Reason.WEIGHT_DIGEST_MISMATCH
    assert (store.active.digest, engine.events) == (contract_digest(BASE), ["discard"])


async def test_a_span_longer_than_a_delta_may_be_is_refused(
    store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steersman.policy.weights.push.MAX_SPAN_ELEMENTS", 1000)
    push_id = await begin(store, 1)
    with pytest.raises(SteersmanError, match="at most 1000 in a sparse delta"):
        await store.write(push_id, large_delta())


async def test_a_new_push_waits_for_the_delta_of_a_caller_that_went_away(
    store: WeightStore, engine: FakeEngine
) -> None:
    push_id = await begin(store, 1)
    caller = asyncio.create_task(store.write(push_id, large_delta()))
    await asyncio.sleep(0)  # it has begun
    caller.cancel()
    await asyncio.wait([caller])
    newer = stepped(BASE, 5)
    await push(store, 2, dense(newer), contract_digest(newer), None)
    assert engine.loaded == host_bytes(newer)
