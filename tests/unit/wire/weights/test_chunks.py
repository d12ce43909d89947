"""Chunks cover a tensor once, in order, each within its limit, and together make the new weights."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from steersman.v1 import weights_pb2
from steersman.wire.weights.chunks import DeltaOptions, EncodedChunk, Encoding, delta_chunks
from steersman.wire.weights.delta import MAX_SPAN_ELEMENTS, Profile, apply_delta


def rebuild(base: NDArray[Any], chunks: Sequence[EncodedChunk]) -> NDArray[Any]:
    """What a receiver makes of the chunks; checks that they adjoin."""
    staging, at = base.copy(), 0
    for chunk in chunks:
        assert chunk.element_offset == at
        assert chunk.num_elements > 0
        span = staging[at : at + chunk.num_elements]
        if chunk.encoding is Encoding.DENSE:
            span[:] = np.frombuffer(chunk.data, span.dtype)
        else:
            apply_delta(chunk.data, span)
        at += chunk.num_elements
    assert at == base.size
    return staging


def uneven_pair(size: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """A tensor whose middle fifth is noise and the rest nearly unchanged: samples mislead."""
    random = np.random.default_rng(0)
    base = random.integers(0, 1 << 16, size, np.uint16)
    new = base.copy()
    new[:: size // 50] += np.uint16(1)
    middle = slice(size * 2 // 5, size * 3 // 5)
    new[middle] = random.integers(0, 1 << 16, new[middle].size, np.uint16)
    return base, new


def test_encodings_are_those_of_the_contract() -> None:
    assert Encoding.DENSE == weights_pb2.WEIGHT_ENCODING_DENSE
    assert Encoding.SPARSE_DELTA == weights_pb2.WEIGHT_ENCODING_SPARSE_DELTA


@given(
    size=st.integers(0, 5000),
    density=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    item_bytes=st.sampled_from([1, 2, 4, 8]),
    max_chunk_bytes=st.integers(1024, 20_000),
    max_density=st.sampled_from([0.05, 1.0]),
    profile=st.sampled_from(Profile),
)
def test_any_tensor(
    size: int, density: float, item_bytes: int, max_chunk_bytes: int, max_density: float, profile: Profile
) -> None:
    random = np.random.default_rng(size)
    base, noise = (np.frombuffer(random.bytes(size * item_bytes), f"<u{item_bytes}") for _ in range(2))
    new = np.where(random.random(size) < density, noise, base)
    options = DeltaOptions(profile=profile, max_chunk_bytes=max_chunk_bytes, max_density=max_density)
    chunks = list(delta_chunks(base, new, options=options))
    assert rebuild(base, chunks).tobytes() == new.tobytes()
    assert all(len(chunk.data) <= max_chunk_bytes for chunk in chunks)


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("max_chunk_bytes", [4096, 1 << 16, 1 << 20])
def test_a_misleading_sample_costs_chunks_not_correctness(profile: Profile, max_chunk_bytes: int) -> None:
    base, new = uneven_pair(600_000)
    chunks = list(delta_chunks(base, new, options=DeltaOptions(profile=profile, max_chunk_bytes=max_chunk_bytes)))
    assert rebuild(base, chunks).tobytes() == new.tobytes()
    assert max(len(chunk.data) for chunk in chunks) <= max_chunk_bytes
    assert {chunk.encoding for chunk in chunks} == set(Encoding) or max_chunk_bytes > 1 << 16


def test_optimiser_steps_fill_their_chunks(
    bfloat16_steps: Mapping[float, list[tuple[NDArray[np.uint16], NDArray[np.uint16]]]],
) -> None:
    options = DeltaOptions(max_chunk_bytes=4096)
    for pairs in bfloat16_steps.values():
        for base, new in pairs:
            chunks = list(delta_chunks(base, new, options=options))
            assert rebuild(base, chunks).tobytes() == new.tobytes()
            assert len(chunks) < 2 + 2 * sum(len(chunk.data) for chunk in chunks) / options.max_chunk_bytes


def test_a_density_above_the_limit_is_sent_dense() -> None:
    base = np.zeros(100_000, np.uint16)
    new = base.copy()
    new[::10] = 1
    encodings = [
        {chunk.encoding for chunk in delta_chunks(base, new, options=DeltaOptions(max_density=limit))}
        for limit in (0.09, 0.11)
    ]
    assert encodings == [{Encoding.DENSE}, {Encoding.SPARSE_DELTA}]


def test_an_unchanged_tensor_is_one_small_chunk_a_segment() -> None:
    base = np.zeros(MAX_SPAN_ELEMENTS + 5, np.uint8)
    chunks = list(delta_chunks(base, base))
    assert [chunk.num_elements for chunk in chunks] == [MAX_SPAN_ELEMENTS, 5]
    assert sum(len(chunk.data) for chunk in chunks) < 50


class CountingExecutor(ThreadPoolExecutor):
    """Knows how many results were asked for and not yet taken."""

    def __init__(self) -> None:
        super().__init__(max_workers=2)
        self.outstanding = self.most = 0
        self._lock = threading.Lock()

    def submit(self, *arguments: Any, **keywords: Any) -> Future[Any]:
        with self._lock:
            self.outstanding += 1
            self.most = max(self.most, self.outstanding)
        return super().submit(*arguments, **keywords)


def test_threads_make_the_same_chunks_in_the_same_order_and_run_only_so_far_ahead() -> None:
    base, new = uneven_pair(600_000)
    options = DeltaOptions(max_chunk_bytes=1 << 14)
    with CountingExecutor() as executor:
        chunks = []
        for chunk in delta_chunks(base, new, options=options, executor=executor, lookahead=3):
            chunks.append(chunk)
            # A span may make several chunks: count down by what is taken, never below what waits.
            executor.outstanding = min(executor.outstanding, 3)
    assert chunks == list(delta_chunks(base, new, options=options))
    assert executor.most <= 4


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="max_chunk_bytes is 1023, allowed: at least 1024"):
        DeltaOptions(max_chunk_bytes=1023)
    with pytest.raises(ValueError, match=r"max_density is 0, allowed: \(0, 1\]"):
        DeltaOptions(max_density=0)
    with pytest.raises(ValueError, match=r"new is uint16\[4\], allowed: uint16\[3\]"):
        delta_chunks(np.zeros(3, np.uint16), np.zeros(4, np.uint16))
    with pytest.raises(ValueError, match="lookahead is 0"):
        delta_chunks(np.zeros(3, np.uint16), np.zeros(3, np.uint16), lookahead=0)
