"""A payload from a faulty or hostile peer is refused by name, before a single element is written."""

import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.weights.delta import Profile, apply_delta, encode_delta

SIZE = 40_000
GUARD = 4096
HEADER = struct.Struct("<BBBBI")
COUNT_AT, CODING_AT, TABLE_AT = 8, 12, 14
"""Of a delta with a single class: its number of changes, its codings, its sections' lengths."""


def span_of(
    item_bytes: int, density: float, density_of_small: float | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Weights, and the same with some of them moved: of those near zero as many as `density_of_small` says."""
    random = np.random.default_rng(item_bytes)
    weights = random.normal(0, 0.02, SIZE).astype(np.float32)
    bits = weights.view(np.uint32)
    base = (bits >> 16 if item_bytes < 4 else bits).astype(f"<u{item_bytes}")
    densities = np.where(np.abs(weights) < 0.008, density if density_of_small is None else density_of_small, density)
    steps = random.choice([1, -1, 2, -5, 300], SIZE, p=[0.45, 0.43, 0.09, 0.02, 0.01])
    return base, base + np.where(random.random(SIZE) < densities, steps, 0).astype(base.dtype)


CASES = {
    "steps of 2 bytes": (*span_of(2, 0.03), Profile.FAST),
    "steps of 1 byte": (*span_of(1, 0.03), Profile.FAST),
    "bitmap": (*span_of(2, 0.8), Profile.FAST),
    "classes": (*span_of(2, 0.01, 0.5), Profile.COMPACT),
    "planes": (*span_of(4, 0.03), Profile.FAST),
    "planes of all": (*span_of(8, 0.9), Profile.FAST),
}


def payload_of(case: str) -> bytes:
    base, new, profile = CASES[case]
    data = encode_delta(base, new, profile=profile)
    assert data is not None
    return data


def apply_guarded(data: bytes, base: NDArray[Any]) -> NDArray[Any]:
    """Applies in the middle of a larger array; checks that its surroundings, and after an error all of it, are kept."""
    memory = np.full(base.size + 2 * GUARD, 0x5A, base.dtype)
    span = memory[GUARD:-GUARD]
    span[:] = base
    try:
        apply_delta(data, span)
    except SteersmanError:
        assert span.tobytes() == base.tobytes(), "an element was written before the error"
        raise
    finally:
        assert (memory[:GUARD] == 0x5A).all()
        assert (memory[-GUARD:] == 0x5A).all()
    return span


def apply_or_refuse(data: bytes, base: NDArray[Any]) -> bool:
    """Whether the payload was taken. Any error but the one for bad chunks fails the test."""
    try:
        apply_guarded(data, base)
    except SteersmanError as error:
        if error.reason is not Reason.WEIGHT_CHUNK_INVALID:
            raise
        return False
    return True


def refused(data: bytes, base: NDArray[Any]) -> str:
    """The message of the error; there must be one."""
    with pytest.raises(SteersmanError) as caught:
        apply_guarded(data, base)
    assert caught.value.reason is Reason.WEIGHT_CHUNK_INVALID
    return caught.value.message


def test_classes_are_several() -> None:
    assert payload_of("classes")[3] > 1
    assert payload_of("bitmap")[CODING_AT] == 1


@pytest.mark.parametrize("case", CASES)
def test_truncation_anywhere(case: str) -> None:
    data, base = payload_of(case), CASES[case][0]
    for length in [*range(64), *range(64, len(data), max(1, len(data) // 50)), len(data) - 1]:
        refused(data[:length], base)
    assert "after the last section" in refused(data + b"\0", base)


@pytest.mark.parametrize("case", CASES)
def test_mutations_are_refused_or_stay_within_the_span(case: str) -> None:
    data, base = payload_of(case), CASES[case][0]
    random = np.random.default_rng(1)
    num_refused = 0
    for trial in range(250):
        mutated = bytearray(data)
        # The head is small and decides most: every second mutation hits it.
        reach = 90 if trial % 2 else len(data)
        for at in random.integers(0, min(reach, len(data)), random.integers(1, 4)):
            mutated[at] ^= int(random.integers(1, 256))
        # What is taken is well formed, and wrong: that is what the digest of the whole is for.
        num_refused += not apply_or_refuse(bytes(mutated), base)
    assert num_refused > 100


@given(item_bytes=st.sampled_from([1, 2, 4, 8]), tail=st.binary(max_size=200), layout=st.integers(0, 4))
@example(item_bytes=2, tail=b"", layout=1)
def test_arbitrary_bytes_behind_a_good_header(item_bytes: int, tail: bytes, layout: int) -> None:
    base = np.arange(16).astype(f"<u{item_bytes}")
    apply_or_refuse(HEADER.pack(1, layout, item_bytes, 1, base.size) + tail, base)


@given(st.binary(max_size=64))
def test_arbitrary_bytes(data: bytes) -> None:
    refused(data, np.zeros(0xFFFF, np.uint16))


def with_header(**changes: int) -> Callable[[bytes], bytes]:
    names = ("version", "layout", "item_bytes", "num_classes", "num_elements")

    def change(data: bytes) -> bytes:
        fields = dict(zip(names, HEADER.unpack_from(data), strict=True)) | changes
        return HEADER.pack(*fields.values()) + data[HEADER.size :]

    return change


def with_u32(at: int, value: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + struct.pack("<I", value) + data[at + 4 :]


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("steps of 2 bytes", with_header(version=2), "chunk.version is 2, allowed: 1"),
        ("steps of 2 bytes", with_header(layout=9), "chunk.layout is '9 with 1 classes'"),
        ("steps of 2 bytes", with_header(layout=2), "chunk.layout"),
        ("planes", with_header(layout=1), "chunk.layout"),
        ("planes", with_header(num_classes=2), "chunk.layout"),
        ("steps of 2 bytes", with_header(item_bytes=4), "chunk.item_bytes is 4, allowed: 2, as the tensor has"),
        ("steps of 2 bytes", with_header(num_elements=SIZE + 1), "chunk.num_elements is 40001, allowed: 40000"),
        ("steps of 2 bytes", with_header(num_classes=0), "chunk.num_classes is 0, allowed: 1 to 4"),
        ("steps of 2 bytes", with_header(num_classes=5), "chunk.num_classes is 5, allowed: 1 to 4"),
        ("steps of 1 byte", with_header(num_classes=2), "chunk.num_classes is 2, allowed: 1 to 1"),
        ("classes", lambda data: data[:8] + b"\0\0" + data[10:], "chunk.thresholds"),
        ("classes", lambda data: data[:8] + b"\xff\xff" + data[10:], "chunk.thresholds"),
        ("steps of 2 bytes", with_u32(COUNT_AT, SIZE + 1), "chunk.num_changes is 40001, allowed: at most 40000"),
        ("steps of 2 bytes", with_u32(COUNT_AT, 1), "chunk.positions"),
        ("steps of 2 bytes", lambda data: data[:CODING_AT] + b"\2" + data[CODING_AT + 1 :], "chunk.positions"),
        ("steps of 2 bytes", lambda data: data[: CODING_AT + 1] + b"\2" + data[TABLE_AT:], "chunk.exceptions"),
        ("steps of 2 bytes", with_u32(TABLE_AT, 1 << 30), "chunk.positions is '1073741824 bytes'"),
        ("steps of 2 bytes", with_u32(TABLE_AT + 4, 1 << 30), "chunk.positions is 'stored in 1073741824 bytes'"),
        ("steps of 2 bytes", with_u32(TABLE_AT + 8, 0), "chunk.signs is '0 bytes'"),
        ("planes", with_u32(COUNT_AT + 5 + 8, 3), "chunk.plane 0 is '3 bytes'"),
    ],
)
def test_the_faulty_field_is_named(case: str, change: Callable[[bytes], bytes], message: str) -> None:
    assert refused(change(payload_of(case)), CASES[case][0]).startswith(message)


def one_class(
    *,
    count: int,
    positions: bytes,
    signs: bytes = b"\0",
    exceptions: bytes = b"",
    magnitudes: bytes = b"",
    wide: bytes = b"",
    codings: bytes = b"\0\0",
    item_bytes: int = 2,
    size: int = 16,
) -> bytes:
    sections = (positions, signs, exceptions, magnitudes, wide)
    table = b"".join(struct.pack("<II", len(section), len(section)) for section in sections)
    head = HEADER.pack(1, 1, item_bytes, 1, size) + struct.pack("<I", count)
    return head + codings + table + b"".join(sections)


def test_the_hand_made_payload_is_read() -> None:
    data = one_class(
        count=3, positions=b"\0\1\4", signs=b"\2", exceptions=b"\1\0", magnitudes=b"\0\xff", wide=b"\x01\x01"
    )
    assert apply_guarded(data, np.full(16, 500, np.uint16)).tolist() == [501, 500, 498] + [500] * 4 + [757] + [500] * 8


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (one_class(count=1, positions=b"\x10"), "chunk.positions is 'positions up to 16', allowed: below 16"),
        (one_class(count=2, positions=b"\x0f\0"), "chunk.positions is 'positions up to 16', allowed: below 16"),
        (one_class(count=1, positions=b"\1\1"), "chunk.positions is '2 bytes', allowed: 1 to 1"),
        (one_class(count=2, positions=b"\1\xff"), "chunk.positions is 'a skip at the end'"),
        (one_class(count=1, positions=b"\3\0", codings=b"\1\0"), "chunk.positions is '2 positions', allowed: 1"),
        (one_class(count=1, positions=b"\1\0\0", codings=b"\1\0"), "chunk.positions is '3 bytes', allowed: 1 to 2"),
        (one_class(count=1, positions=b"\0\x40", codings=b"\1\0", size=14), "chunk.positions is 'positions up to 14'"),
        (one_class(count=1, positions=b"\0", signs=b"\2"), "chunk.signs is 'bits beyond the last change'"),
        (one_class(count=1, positions=b"\0", exceptions=b"\0"), "chunk.exceptions is '1 positions', allowed: 0"),
        (one_class(count=1, positions=b"\0", exceptions=b"\1", magnitudes=b"\0"), "chunk.exceptions is 'positions up"),
        (one_class(count=1, positions=b"\0", magnitudes=b"\0"), "chunk.exceptions is '0 positions', allowed: 1"),
        (one_class(count=1, positions=b"\0", exceptions=b"\0", magnitudes=b"\xff"), "chunk.wide is '0 bytes'"),
        (one_class(count=1, positions=b"\0", wide=b"\1\1"), "chunk.wide is '2 bytes', allowed: 0"),
        (
            one_class(count=1, positions=b"\0", exceptions=b"\0", magnitudes=b"\xff", wide=b"\0\1"),
            "chunk.wide is 'magnitudes 256 to 256', allowed: 257 to 32768",
        ),
        (
            one_class(count=1, positions=b"\0", exceptions=b"\0", magnitudes=b"\x7f", item_bytes=1),
            "chunk.magnitudes is 'steps of up to 129', allowed: at most 128",
        ),
    ],
)
def test_sections_that_contradict_each_other(data: bytes, message: str) -> None:
    item_bytes, size = data[2], data[4]
    assert refused(data, np.zeros(size, f"<u{item_bytes}")).startswith(message)


def test_ranks_beyond_a_class() -> None:
    base, new, _ = CASES["classes"]
    data = payload_of("classes")
    # Where no old value belongs to the low classes, their ranks lead nowhere.
    assert "the members of class 0" in refused(data, np.full(base.size, 0x7FFF, np.uint16))
    assert apply_guarded(data, base).tobytes() == new.tobytes()


def test_a_small_payload_cannot_unfold_into_much_memory() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    data = HEADER.pack(1, 1, 2, 1, SIZE) + struct.pack("<IBB", 1000, 0, 0)
    data += struct.pack("<II", 1100, len(bomb)) + struct.pack("<II", 125, 125) + bytes(24) + bomb + bytes(125)
    honest_looking = data.replace(struct.pack("<II", 1100, len(bomb)), struct.pack("<II", 1100, 1099))
    tracemalloc.start()
    try:
        for payload in (data, honest_looking):
            refused(payload, np.zeros(SIZE, np.uint16))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
