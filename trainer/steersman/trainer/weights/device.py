"""Finds and packs changes where the weights are: on a GPU, at its memory's speed, instead of on the host's cores.

Spans of many tensors are laid end to end, so that a few operations serve all of them; what they leave (gaps, signs and
magnitudes of the changes, about one byte for each) crosses to the host in one copy, and only zstd is left to do there.
The bytes are those that the host's encoder makes (`steersman.wire.weights`), whichever encodes.

Memory on the device while it works, beside the weights: two copies of a batch (`_BATCH_ELEMENTS`) and its mask, and
about a hundred bytes for each change in it.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steersman.trainer.weights.slices import Manifest, WeightSlices
from steersman.wire.weights.chunks import (
    RUN_ELEMENTS,
    DeltaOptions,
    EncodedChunk,
    Encoding,
    Span,
    plan_spans,
    sampled_runs,
)
from steersman.wire.weights.delta import PackedChanges, encode_packed
from steersman.wire.weights.positions import SKIP

MAX_ITEM_BYTES: Final = 2
"""Wider elements are packed by the host: nearly all of them change."""
_BATCH_ELEMENTS: Final = 1 << 24
_WIDE: Final = 255
_BIT_WEIGHTS: Final = tuple(1 << bit for bit in range(8))


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One tensor, old and new as signed integers, and the spans that are to be encoded."""

    index: int
    old: Tensor
    new: Tensor
    spans: list[Span]


def device_chunks(
    base: WeightSlices,
    new: WeightSlices,
    manifest: Manifest,
    *,
    device: torch.device,
    options: DeltaOptions,
    threads: Executor,
) -> Iterator[list[EncodedChunk]]:
    """The chunks of one tensor after the other, for those whose elements have at most MAX_ITEM_BYTES: as `delta_chunks`
    in FAST, but that dense chunks have no data. A batch is packed when its first tensor is asked for.
    """
    batch: list[_Work] = []
    num_elements = 0
    for index, spec in enumerate(manifest):
        if getattr(torch, spec.dtype).itemsize > MAX_ITEM_BYTES:
            continue
        size = new.num_elements(spec)
        if batch and num_elements + size > _BATCH_ELEMENTS:
            yield from _encoded(batch, options, threads)
            batch, num_elements = [], 0
        old_bits, new_bits = base.integers(spec, device), new.integers(spec, device)
        batch.append(_Work(index=index, old=old_bits, new=new_bits, spans=_plan(old_bits, new_bits, options)))
        num_elements += size
    yield from _encoded(batch, options, threads)


def _plan(old: Tensor, new: Tensor, options: DeltaOptions) -> list[Span]:
    def sample(start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
        runs = [slice(start + at, min(stop, start + at + RUN_ELEMENTS)) for at in sampled_runs(stop - start)]
        both = torch.stack([torch.cat([part[run] for run in runs]) for part in (old, new)]).cpu().numpy()
        return both[0], both[1]

    return list(plan_spans(new.numel(), new.element_size(), sample, options))


def _encoded(batch: Sequence[_Work], options: DeltaOptions, threads: Executor) -> Iterator[list[EncodedChunk]]:
    sparse = [(work, span) for work in batch for span in work.spans if not span.is_dense]
    found = dict(zip(((work.index, span) for work, span in sparse), _encode(sparse, threads), strict=True))
    for work in batch:
        chunks: list[EncodedChunk] = []
        for span in work.spans:
            chunks += _chunks(work, span, found.get((work.index, span)), options, threads)
        yield chunks


def _chunks(
    work: _Work, span: Span, data: bytes | None, options: DeltaOptions, threads: Executor
) -> Iterator[EncodedChunk]:
    size = span.stop - span.start
    if data is not None and len(data) <= options.max_chunk_bytes:
        encoding = Encoding.SPARSE_DELTA
    elif size * work.new.element_size() <= options.max_chunk_bytes:
        encoding, data = Encoding.DENSE, b""
    else:
        halves = span.halves()
        sparse = [(work, half) for half in halves if not half.is_dense]
        for half, part in zip(halves, _encode(sparse, threads) or [None] * len(halves), strict=True):
            yield from _chunks(work, half, part, options, threads)
        return
    yield EncodedChunk(element_offset=span.start, num_elements=size, encoding=encoding, data=data)


def _encode(spans: Sequence[tuple[_Work, Span]], threads: Executor) -> list[bytes | None]:
    """Deltas of spans, in groups of at most a batch and of one width."""
    groups: list[list[tuple[Tensor, Tensor]]] = []
    room, width = 0, 0
    for work, span in spans:
        size = span.stop - span.start
        if size > room or work.new.element_size() != width:
            groups.append([])
            room, width = _BATCH_ELEMENTS, work.new.element_size()
        groups[-1].append((work.old[span.start : span.stop], work.new[span.start : span.stop]))
        room -= size
    packed = (changes for group in groups for changes in pack_changes(group))
    return list(threads.map(encode_packed, packed))


def pack_changes(spans: Sequence[tuple[Tensor, Tensor]]) -> list[PackedChanges]:
    """The changes of spans, each old and new: flat tensors of the same signed integers of 1 or 2 bytes, none empty, all
    on one device. Waits for the device twice.
    """
    old, new = (torch.cat(parts) for parts in zip(*spans, strict=True))
    sizes = torch.tensor([part.numel() for part, _ in spans], device=old.device)
    ends = sizes.cumsum(0)
    where = (old != new).nonzero().reshape(-1)
    owner = torch.bucketize(where, ends, right=True)
    counts = torch.bincount(owner, minlength=len(spans))
    rank = _ranks(owner, counts)
    steps = _ordered(new[where]) - _ordered(old[where])
    gaps, gap_bytes = _gaps(where - (ends - sizes)[owner], owner, rank, len(spans))
    signs = _pack_bits(steps < 0, owner, rank, counts)

    magnitudes = steps.to(torch.int32).abs()
    large = (magnitudes != 1).nonzero().reshape(-1)
    large_owner, above = owner[large], magnitudes[large] - 2
    large_counts = torch.bincount(large_owner, minlength=len(spans))
    large_rank = _ranks(large_owner, large_counts)
    large_gaps, large_gap_bytes = _gaps(rank[large], large_owner, large_rank, len(spans))
    is_wide = above >= _WIDE
    wide = (above[is_wide] + 2).to(new.dtype).view(torch.uint8)
    wide_counts = torch.bincount(large_owner[is_wide], minlength=len(spans))

    table = torch.stack([counts, gap_bytes, large_counts, large_gap_bytes, wide_counts]).cpu().tolist()
    data = _to_host(torch.cat([gaps, signs, large_gaps, above.clamp(max=_WIDE).to(torch.uint8), wide]))
    return _cut(data, table, [part.numel() for part, _ in spans], new.element_size())


def _ordered(bits: Tensor) -> Tensor:
    """As `steersman.wire.weights.steps.ordered`."""
    info = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def _starts(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


def _ranks(owner: Tensor, counts: Tensor) -> Tensor:
    """Which of its span each one is."""
    return torch.arange(owner.numel(), device=owner.device) - _starts(counts)[owner]


def _gaps(positions: Tensor, owner: Tensor, rank: Tensor, num_spans: int) -> tuple[Tensor, Tensor]:
    """Gaps as `steersman.wire.weights.positions` writes them, span after span, and their bytes for each span."""
    before = torch.where(rank == 0, -1, positions.roll(1))
    gaps = positions - before - 1
    skips = gaps // SKIP
    lengths = skips + 1
    ends = lengths.cumsum(0)
    num_bytes = torch.zeros(num_spans, dtype=torch.int64, device=owner.device).index_add_(0, owner, lengths)
    total = int(ends[-1]) if ends.numel() else 0
    encoded = torch.full((total,), SKIP, dtype=torch.uint8, device=owner.device)
    encoded[ends - 1] = (gaps - skips * SKIP).to(torch.uint8)
    return encoded, num_bytes


def _pack_bits(bits: Tensor, owner: Tensor, rank: Tensor, counts: Tensor) -> Tensor:
    """Eight to a byte, the first the lowest; each span begins with a byte of its own."""
    num_bytes = (counts + 7) // 8
    spread = torch.zeros(8 * int(num_bytes.sum()), dtype=torch.uint8, device=bits.device)
    spread[8 * _starts(num_bytes)[owner] + rank] = bits.to(torch.uint8)
    weights = torch.tensor(_BIT_WEIGHTS, dtype=torch.uint8, device=bits.device)
    return (spread.reshape(-1, 8) * weights).sum(1, dtype=torch.uint8)


def _to_host(data: Tensor) -> memoryview:
    """One copy, to pinned memory where that is of use."""
    host = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
    host.copy_(data)
    array: Any = host.numpy()
    return memoryview(array)


def _cut(data: memoryview, table: list[list[int]], sizes: Sequence[int], item_bytes: int) -> list[PackedChanges]:
    """The sections of each span."""
    counts, gap_bytes, large_counts, large_gap_bytes, wide_counts = table
    lengths = [
        gap_bytes,
        [-(-count // 8) for count in counts],
        large_gap_bytes,
        large_counts,
        [item_bytes * count for count in wide_counts],
    ]
    bounds = np.cumsum([0, *(length for section in lengths for length in section)]).tolist()
    num = len(sizes)
    found = []
    for span, size in enumerate(sizes):
        at = [section * num + span for section in range(len(lengths))]
        gaps, signs, large_gaps, magnitudes, wide = (bytes(data[bounds[one] : bounds[one + 1]]) for one in at)
        found.append(
            PackedChanges(
                num_elements=size,
                item_bytes=item_bytes,
                num_changes=counts[span],
                gaps=gaps,
                signs=signs,
                num_exceptions=large_counts[span],
                exception_gaps=large_gaps,
                magnitudes=magnitudes,
                wide=wide,
            )
        )
    return found
