"""A tensor's changes as chunks that each fit a message: the streaming form of the codec.

The span of a chunk is chosen by a glance at how densely the tensor changed, so that one pass of the encoder nearly
fills a message; a chunk that turns out too large is halved. Where a delta would not be smaller, and where more has
changed than `DeltaOptions.max_density`, the elements travel dense.

With an executor, segments of the tensor are encoded ahead of the consumer by as many threads as it has (numpy and
zstandard leave the interpreter's lock), at most `lookahead` segments at a time; chunks come in ascending order all
the same.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steersman.wire.limits import WEIGHT_CHUNK_BYTES
from steersman.wire.weights.delta import MAX_SPAN_ELEMENTS, Profile, encode_delta
from steersman.wire.weights.steps import integers, steps_between

_MIN_CHUNK_BYTES: Final = 1024
_SAMPLE_RUNS: Final = 16
RUN_ELEMENTS: Final = 1024
_HEADROOM: Final = 0.85
"""Part of a chunk to aim at: a sample misses the true density by some per cent."""
_STEP_BITS: Final = 2.2
"""Of a step beyond the logarithm of its size: its sign, and what a prefix code costs."""
_GRAIN: Final = 64
"""Elements; spans are multiples of it, so that all but the last are aligned alike."""


class Encoding(IntEnum):
    """How a chunk's data is encoded: the numbers of `steersman.v1.WeightEncoding`."""

    DENSE = 1
    SPARSE_DELTA = 2


@dataclass(frozen=True, kw_only=True)
class EncodedChunk:
    """Elements [element_offset, element_offset + num_elements) of a flattened tensor."""

    element_offset: int
    num_elements: int
    encoding: Encoding
    data: bytes


@dataclass(frozen=True, kw_only=True)
class DeltaOptions:
    """How to make chunks.

    Attributes:
        profile: what the encoding is optimised for.
        max_chunk_bytes: largest data of one chunk, at least 1024.
        max_density: changed elements per element, (0, 1], above which a chunk is sent dense although a delta would be
            smaller: on a fast link that is sooner there.
    """

    profile: Profile = Profile.FAST
    max_chunk_bytes: int = WEIGHT_CHUNK_BYTES
    max_density: float = 1.0

    def __post_init__(self) -> None:
        if self.max_chunk_bytes < _MIN_CHUNK_BYTES:
            raise ValueError(f"max_chunk_bytes is {self.max_chunk_bytes}, allowed: at least {_MIN_CHUNK_BYTES}")
        if not 0 < self.max_density <= 1:
            raise ValueError(f"max_density is {self.max_density}, allowed: (0, 1]")


def delta_chunks(
    base: NDArray[Any],
    new: NDArray[Any],
    *,
    options: DeltaOptions | None = None,
    executor: Executor | None = None,
    lookahead: int = 2,
) -> Iterator[EncodedChunk]:
    """Chunks that cover all of `new` once, in ascending order; none for an empty tensor.

    Both are flat, contiguous, of one 1, 2, 4 or 8 byte dtype and of any equal size; neither may change until the last
    chunk is taken. Memory beyond the chunk in hand: a few bytes for each changed element of `lookahead` segments of at
    most MAX_SPAN_ELEMENTS.
    """
    if base.ndim != 1 or base.shape != new.shape or base.dtype.itemsize != new.dtype.itemsize:
        found = f"{new.dtype}{list(new.shape)}"
        raise ValueError(f"new is {found}, allowed: {base.dtype}{list(base.shape)} as base, one dimension")
    if lookahead < 1:
        raise ValueError(f"lookahead is {lookahead}, allowed: at least 1")
    return _chunks(base, new, options or DeltaOptions(), executor, lookahead)


def _chunks(
    base: NDArray[Any], new: NDArray[Any], options: DeltaOptions, executor: Executor | None, lookahead: int
) -> Iterator[EncodedChunk]:
    def sample(start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
        runs = sampled_runs(stop - start)
        old, now = integers(base[start:stop]), integers(new[start:stop])
        return _joined(old, runs), _joined(now, runs)

    spans = plan_spans(new.size, new.itemsize, sample, options)
    if executor is None:
        for span in spans:
            yield from _encode(base, new, span, options)
        return
    pending: deque[Future[list[EncodedChunk]]] = deque()
    try:
        for span in spans:
            pending.append(executor.submit(_encode, base, new, span, options))
            if len(pending) > lookahead:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


@dataclass(frozen=True, kw_only=True)
class Span:
    """Elements [start, stop) that are likely to fill a chunk; `is_dense` if a delta of them is not worth while."""

    start: int
    stop: int
    is_dense: bool = False

    def halves(self) -> "list[Span]":
        """For a span that turned out to be too much."""
        middle = self.start + (self.stop - self.start) // 2
        return [replace(self, stop=middle), replace(self, start=middle)]


def plan_spans(
    size: int, item_bytes: int, sample: Callable[[int, int], tuple[NDArray[Any], NDArray[Any]]], options: DeltaOptions
) -> Iterator[Span]:
    """The spans of a tensor of `size` elements. `sample` gives the `sampled_runs` of a part of it, old and new, joined,
    as signed integers.
    """
    for start in range(0, size, MAX_SPAN_ELEMENTS):
        stop = min(size, start + MAX_SPAN_ELEMENTS)
        density, bits = _estimate(*sample(start, stop))
        is_dense = density > options.max_density
        if is_dense:
            length = options.max_chunk_bytes // item_bytes
        else:
            fitting = int(8 * _HEADROOM * options.max_chunk_bytes / max(bits, 1e-6))
            num_spans = -(-(stop - start) // max(fitting, 1))
            length = -(-(stop - start) // num_spans)
        length = max(_GRAIN, -(-length // _GRAIN) * _GRAIN) if not is_dense else length
        for at in range(start, stop, length):
            yield Span(start=at, stop=min(stop, at + length), is_dense=is_dense)


def sampled_runs(size: int) -> list[int]:
    """Where runs of RUN_ELEMENTS begin that stand for a part of so many elements; the last one may be shorter."""
    if size <= _SAMPLE_RUNS * RUN_ELEMENTS:
        return list(range(0, size, RUN_ELEMENTS))
    runs: list[int] = np.linspace(0, size - RUN_ELEMENTS, _SAMPLE_RUNS).astype(np.int64).tolist()
    return runs


def _joined(part: NDArray[Any], runs: list[int]) -> NDArray[Any]:
    return np.concatenate([part[at : at + RUN_ELEMENTS] for at in runs])


def _estimate(old: NDArray[Any], new: NDArray[Any]) -> tuple[float, float]:
    """Changed elements per element, and bits that a delta will need for each element, from a sample."""
    moves = steps_between(old, new)
    changed = moves[moves != 0].astype(np.float64)
    density = changed.size / moves.size
    if not changed.size:
        return 0.0, 0.0
    entropy = -density * np.log2(density) - (1 - density) * np.log2(1 - density) if density < 1 else 0.0
    return density, float(entropy + density * (np.log2(np.abs(changed)).mean() + _STEP_BITS))


def _encode(base: NDArray[Any], new: NDArray[Any], span: Span, options: DeltaOptions) -> list[EncodedChunk]:
    size = span.stop - span.start
    elements = new[span.start : span.stop]
    data = None if span.is_dense else encode_delta(base[span.start : span.stop], elements, profile=options.profile)
    if data is not None and len(data) <= options.max_chunk_bytes:
        encoding = Encoding.SPARSE_DELTA
    elif elements.nbytes <= options.max_chunk_bytes:
        encoding, data = Encoding.DENSE, elements.tobytes()
    else:
        # Denser than its sample promised, or not worth a delta: smaller spans of the same kind.
        return [chunk for half in span.halves() for chunk in _encode(base, new, half, options)]
    return [EncodedChunk(element_offset=span.start, num_elements=size, encoding=encoding, data=data)]
