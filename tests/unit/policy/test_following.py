"""A digest that is made while a copy fills, against the digest of the whole."""

import asyncio
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.policy.weights import following
from steersman.policy.weights.following import FollowingDigest
from steersman.policy.weights.manifest import HostManifest, TensorSpec, digest
from steersman.wire.weights import digest as wire_digest

MANIFEST = HostManifest.of(
    TensorSpec(name=f"t{index}", shape=(size,), dtype="float16") for index, size in enumerate((40, 7, 0, 1, 64, 30))
)
PARTS = [
    (index, part)
    for index, tensor in enumerate(MANIFEST.tensors)
    for part in itertools.pairwise(sorted({0, tensor.num_elements // 3, tensor.num_elements // 2, tensor.num_elements}))
]


@pytest.fixture(autouse=True)
def follow_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_MIN_BYTES", 100)
    for module in (following, wire_digest):
        monkeypatch.setattr(module, "TILE_ELEMENTS", 8)


async def fill(order: list[tuple[int, tuple[int, int]]], pauses: set[int]) -> None:
    """Writes parts of tensors in this order, letting threads run after some of them."""
    copy = memoryview(bytearray(MANIFEST.nbytes))
    made = FollowingDigest(MANIFEST, copy)
    noise = np.random.default_rng(len(order)).bytes(MANIFEST.nbytes)
    for number, (index, (start, end)) in enumerate(order):
        offset = MANIFEST.slots[index].offset_bytes
        copy[offset + 2 * start : offset + 2 * end] = noise[offset + 2 * start : offset + 2 * end]
        made.wrote(index, start, end - start)
        if number in pauses:
            await made.settle()
    await made.settle()
    assert await made.finish() == digest(MANIFEST, copy)


@settings(deadline=None, max_examples=40)
@given(st.permutations(PARTS), st.sets(st.integers(0, len(PARTS))), st.integers(0, len(PARTS)))
def test_in_any_order_and_with_any_part_missing(
    order: list[tuple[int, tuple[int, int]]], pauses: set[int], count: int
) -> None:
    asyncio.run(fill(order, pauses))
    asyncio.run(fill(order[:count], pauses))


async def test_tiles_are_hashed_before_the_last_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = memoryview(bytearray(MANIFEST.nbytes))
    made = FollowingDigest(MANIFEST, copy)
    for index, tensor in list(enumerate(MANIFEST.tensors))[:-1]:
        made.wrote(index, 0, tensor.num_elements)
    await made.settle()
    before = digest(MANIFEST, copy)
    # What is complete is not read again: it would show.
    copy[: MANIFEST.slots[-1].offset_bytes] = b"\1" * MANIFEST.slots[-1].offset_bytes
    made.wrote(len(MANIFEST.tensors) - 1, 0, MANIFEST.tensors[-1].num_elements)
    assert await made.finish() == before
