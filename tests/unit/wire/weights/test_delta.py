"""Deltas reproduce every bit, whatever the bits are, and are refused when they would not be smaller."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from steersman.wire.weights.delta import MAX_SPAN_ELEMENTS, Profile, apply_delta, encode_delta

UNSIGNED = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}
SIZES = list(UNSIGNED)
SPECIAL = [0x0000, 0x8000, 0x0001, 0x8001, 0x7F7F, 0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0x7FFF, 0xFFFF, 0xFFC1]
"""bfloat16: zeros, smallest, largest, infinities, NaNs with payloads."""


def round_trip(base: NDArray[Any], new: NDArray[Any], profile: Profile) -> bytes | None:
    """Encodes, applies, compares all bits; the delta."""
    kept = base.copy(), new.copy()
    data = encode_delta(base, new, profile=profile)
    assert (base.tobytes(), new.tobytes()) == (kept[0].tobytes(), kept[1].tobytes()), "the arguments changed"
    if data is None:
        return None
    assert len(data) < new.nbytes
    staging = base.copy()
    num_changes = apply_delta(data, staging)
    assert staging.tobytes() == new.tobytes()
    raw = UNSIGNED[base.itemsize]
    assert num_changes == np.count_nonzero(base.view(raw) != new.view(raw))
    return data


def changed_at(positions: Any, *, size: int, value: int = 1, dtype: str = "<u2") -> tuple[NDArray[Any], NDArray[Any]]:
    """A span, and the same with some elements' bits flipped."""
    base = (np.arange(size) % 251).astype(dtype)
    new = base.copy()
    new[positions] ^= new.dtype.type(value)
    return base, new


@given(
    item_bytes=st.sampled_from(SIZES),
    profile=st.sampled_from(Profile),
    size=st.integers(1, 3000),
    density=st.sampled_from([0.0, 0.002, 0.05, 0.4, 0.6, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_arbitrary_bits(item_bytes: int, profile: Profile, size: int, density: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    base = np.frombuffer(random.bytes(size * item_bytes), UNSIGNED[item_bytes])
    other = np.frombuffer(random.bytes(size * item_bytes), UNSIGNED[item_bytes])
    new = np.where(random.random(size) < density, other, base)
    round_trip(base, new, profile)


@given(st.lists(st.tuples(st.sampled_from(SPECIAL), st.sampled_from(SPECIAL)), min_size=1, max_size=300))
def test_special_floats(pairs: list[tuple[int, int]]) -> None:
    padding = np.zeros(500, np.uint16)
    base = np.concatenate([padding, np.array([old for old, _ in pairs], np.uint16)])
    new = np.concatenate([padding, np.array([new for _, new in pairs], np.uint16)])
    for profile in Profile:
        round_trip(base, new, profile)


@pytest.mark.parametrize("profile", Profile)
def test_every_bfloat16_pattern_reaches_every_distance(profile: Profile) -> None:
    base = np.tile(np.arange(1 << 16, dtype=np.uint16), 2)
    for distance in (1, 2, 255, 256, 257, 258, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        assert round_trip(base, base + np.uint16(distance), profile) is not None


@pytest.mark.parametrize("item_bytes", SIZES)
@pytest.mark.parametrize("profile", Profile)
def test_nothing_changed(item_bytes: int, profile: Profile) -> None:
    base = np.arange(1000).astype(UNSIGNED[item_bytes])
    data = round_trip(base, base.copy(), profile)
    assert data is not None
    assert len(data) < 100


@pytest.mark.parametrize("item_bytes", SIZES)
@pytest.mark.parametrize("profile", Profile)
def test_everything_changed_by_the_same_step(item_bytes: int, profile: Profile) -> None:
    base = np.full(100_000, 40, UNSIGNED[item_bytes])
    data = round_trip(base, base + base.dtype.type(1), profile)
    assert data is not None
    assert len(data) < 1000


@pytest.mark.parametrize("item_bytes", SIZES)
def test_noise_is_better_sent_dense(item_bytes: int) -> None:
    random = np.random.default_rng(0)
    base, new = (np.frombuffer(random.bytes(10_000 * item_bytes), UNSIGNED[item_bytes]) for _ in range(2))
    for profile in Profile:
        assert encode_delta(base, new, profile=profile) is None


def test_spans_too_short_for_a_delta_are_sent_dense() -> None:
    one = np.zeros(1, np.uint16)
    assert encode_delta(one, one) is None
    assert encode_delta(one[:0], one[:0]) is None


@pytest.mark.parametrize("item_bytes", SIZES)
@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("where", [[0], [-1], [0, -1], [0, 1, 2], [254], [255], [256], [0, 255], [0, 256], [0, 257]])
def test_ends_and_gaps_about_one_byte(item_bytes: int, profile: Profile, where: list[int]) -> None:
    base, new = changed_at(where, size=1037, dtype=f"<u{item_bytes}")
    assert round_trip(base, new, profile) is not None


@pytest.mark.parametrize("gap", [254, 255, 256, 509, 510, 511, 65_535, 65_536, 262_143, 262_144, 262_145, 1_000_000])
@pytest.mark.parametrize("profile", Profile)
def test_long_gaps(gap: int, profile: Profile) -> None:
    base, new = changed_at([7, 7 + gap + 1], size=gap + 20)
    data = round_trip(base, new, profile)
    assert data is not None
    assert len(data) < 250 or gap < 2000


@pytest.mark.parametrize("size", [262_143, 262_144, 262_145, 524_289, 800_001])
@pytest.mark.parametrize("profile", Profile)
def test_across_the_blocks_of_the_search(size: int, profile: Profile) -> None:
    random = np.random.default_rng(size)
    base = random.normal(0, 0.02, size).astype(np.float16).view(np.uint16)
    new = base + (random.random(size) < 0.03).astype(np.uint16)
    new[[0, -1]] += np.uint16(300)
    assert round_trip(base, new, profile) is not None


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<f2", "<i4", "?"])
def test_dtypes_other_than_raw_integers(dtype: str) -> None:
    base = (np.arange(2000) % 2).astype(dtype)
    new = base.copy()
    new[::97] = 1 - new[::97].astype(np.int64)
    assert round_trip(base, new, Profile.FAST) is not None


@pytest.mark.parametrize("profile", Profile)
def test_optimiser_steps(
    bfloat16_steps: Mapping[float, list[tuple[NDArray[np.uint16], NDArray[np.uint16]]]], profile: Profile
) -> None:
    for pairs in bfloat16_steps.values():
        for base, new in pairs:
            assert round_trip(base, new, profile) is not None


def test_optimiser_steps_of_float32_weights(
    master_steps: Mapping[float, list[tuple[NDArray[np.float32], NDArray[np.float32]]]],
) -> None:
    for pairs in master_steps.values():
        for base, new in pairs:
            data = round_trip(base, new, Profile.FAST)
            assert data is not None or base.size < 1000
            assert data is None or base.size < 1000 or len(data) < 0.5 * new.nbytes


def test_the_compact_profile_is_smaller(
    bfloat16_steps: Mapping[float, list[tuple[NDArray[np.uint16], NDArray[np.uint16]]]],
) -> None:
    for pairs in bfloat16_steps.values():
        fast, compact = (sum(len(encode_delta(*pair, profile=profile) or b"") for pair in pairs) for profile in Profile)
        assert compact < 0.87 * fast


def flat_entropy_bytes(base: NDArray[np.uint16], new: NDArray[np.uint16]) -> float:
    """Bytes that no code can beat that takes positions and steps as independent of each other and of the base."""

    def bits(counts: NDArray[np.int64]) -> float:
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log2(shares)).sum())

    old_rank, new_rank = (np.where(bits < 0x8000, bits + 0x8000, 0xFFFF - bits) for bits in map(np.int64, (base, new)))
    moves = (new_rank - old_rank)[base != new]
    positions = base.size * bits(np.array([moves.size, base.size - moves.size]))
    return (positions + moves.size * bits(np.unique(moves, return_counts=True)[1])) / 8


def test_bytes_are_near_the_flat_entropy(
    bfloat16_steps: Mapping[float, list[tuple[NDArray[np.uint16], NDArray[np.uint16]]]],
) -> None:
    for pairs in bfloat16_steps.values():
        # As one span: the tensors of this model are too small for code tables not to count.
        base, new = (np.concatenate(side) for side in zip(*pairs, strict=True))
        fast, compact = (len(encode_delta(base, new, profile=profile) or b"") for profile in Profile)
        entropy = flat_entropy_bytes(base, new)
        assert fast < 1.05 * entropy
        assert compact < 0.85 * entropy


def test_applying_twice_is_not_applying_once() -> None:
    base, new = changed_at([3, 500], size=1000)
    data = encode_delta(base, new)
    assert data is not None
    staging = base.copy()
    apply_delta(data, staging)
    apply_delta(data, staging)
    assert staging.tobytes() != new.tobytes()


@pytest.mark.parametrize(
    ("base", "new", "message"),
    [
        (np.zeros(3, np.uint16), np.zeros(4, np.uint16), "new is 4 elements of 2 bytes, allowed: 3 of 2"),
        (np.zeros(3, np.uint16), np.zeros(3, np.uint32), "new is 3 elements of 4 bytes, allowed: 3 of 2"),
        (np.zeros((3, 1), np.uint16), np.zeros(3, np.uint16), r"base is uint16\[3, 1\], allowed: one dimension"),
        (np.zeros(3, np.uint16), np.zeros(6, np.uint16)[::2], r"new is uint16\[3\], allowed: .*contiguous"),
        (np.zeros(3, np.complex128), np.zeros(3, np.complex128), "allowed: .*1, 2, 4 or 8 bytes"),
        (np.zeros(MAX_SPAN_ELEMENTS + 1, np.uint8),) * 2 + ("at most 16777216",),
    ],
)
def test_what_cannot_be_encoded_is_named(base: NDArray[Any], new: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_delta(base, new)


def test_a_span_in_use_elsewhere_cannot_be_written() -> None:
    base, new = changed_at([3], size=1000)
    data = encode_delta(base, new)
    assert data is not None
    base.setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        apply_delta(data, base)
