"""Chunks of one push."""

import dataclasses
import random

import pytest
from policy_fakes import MANIFEST, chunks, host_bytes, random_weights

from steersman.policy.weights.push import Phase, Push
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.identity import WeightVersion
from steersman.wire.weights.chunks import Encoding
from steersman.wire.weights.messages import Chunk

WEIGHTS = random_weights(1)


@pytest.fixture
def staging() -> bytearray:
    return bytearray(MANIFEST.nbytes)


@pytest.fixture
async def push(staging: bytearray) -> Push:
    return Push(
        push_id="p",
        version=WeightVersion(run_id="r", step=1),
        partial=False,
        idle_timeout_s=60,
        manifest=MANIFEST,
        staging=memoryview(staging),
    )


async def test_chunks_in_any_order_make_the_weights(push: Push, staging: bytearray) -> None:
    shuffled = chunks(WEIGHTS)
    random.Random(0).shuffle(shuffled)
    for chunk in shuffled:
        with pytest.raises(SteersmanError):
            push.require_complete()
        await push.write(chunk)
    push.require_complete()
    assert bytes(staging) == host_bytes(WEIGHTS)


def second_of_b() -> Chunk:
    """Elements [4, 8) of b.weight."""
    return chunks(WEIGHTS)[3]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tensor_index": 3}, "tensor_index"),
        ({"element_offset": 9}, "num_elements"),
        ({"element_offset": 2**63}, "num_elements"),
        ({"num_elements": 0, "data": b""}, "num_elements"),
        ({"data": b"x"}, "data"),
        ({"checksum": 1}, "checksum"),
        ({"encoding": Encoding.SPARSE_DELTA}, "encoding"),
        ({"encoding": 0}, "encoding"),
    ],
)
async def test_a_bad_chunk_is_named_and_leaves_no_trace(
    push: Push, staging: bytearray, change: dict[str, object], field: str
) -> None:
    good = second_of_b()
    with pytest.raises(SteersmanError) as caught:
        await push.write(dataclasses.replace(good, **change))  # type: ignore[arg-type]
    assert caught.value.reason is Reason.WEIGHT_CHUNK_INVALID
    assert caught.value.violations[0].field == f"chunk.{field}"
    assert not any(staging)
    await push.write(good)  # the span is still free


async def test_a_chunk_larger_than_allowed_is_refused(push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steersman.policy.weights.push.WEIGHT_CHUNK_BYTES", 15)
    with pytest.raises(SteersmanError, match="at most 15"):
        await push.write(second_of_b())


async def test_doubled_and_overlapping_chunks_are_refused(push: Push, staging: bytearray) -> None:
    good = second_of_b()
    await push.write(good)
    before = bytes(staging)
    other = random_weights(2)
    for again in (good, *chunks(other, max_elements=6)[1:3]):  # [0, 6) and [6, 12) both touch [4, 8)
        with pytest.raises(SteersmanError) as caught:
            await push.write(again)
        assert caught.value.violations[0].field == "chunk.element_offset"
    assert bytes(staging) == before


async def test_what_is_missing_is_named(push: Push) -> None:
    for chunk in chunks(WEIGHTS):
        if chunk != second_of_b():
            await push.write(chunk)
    with pytest.raises(SteersmanError, match=r"element 4 of tensor 'b\.weight'") as caught:
        push.require_complete()
    assert caught.value.reason is Reason.WEIGHTS_INCOMPLETE


async def test_no_chunks_once_it_is_being_verified(push: Push) -> None:
    push.phase = Phase.VERIFYING
    with pytest.raises(SteersmanError) as caught:
        await push.write(second_of_b())
    assert caught.value.reason is Reason.WEIGHT_PUSH_NOT_ACTIVE
