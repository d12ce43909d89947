"""Rows of token ids one behind the other without padding, what they begin with in common laid down once.

Rows [1 2 3 4], [1 2 3 9 8] and [7] (sharing from the first token on, for the example) become

    token ids   1 2 3 4 | 9 8 | 7
    positions   0 1 2 3 | 3 4 | 0

in three segments. Tokens of the second attend to those at 0 to 3, which come before them in their row, and to
themselves. A segment continues any number of earlier ones: a conversation, the answer to it, and the next turn.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from steersman.serving.prefixes import num_shared, sort_key

Span: TypeAlias = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Tokens `start` to `stop` of the pack; `before` are the spans, in order, of what precedes them in their row."""

    start: int
    stop: int
    before: tuple[Span, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """Token ids and positions [tokens], int64; `last` [rows] is where in the pack the last token of each row is."""

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: tuple[Segment, ...]
    last: NDArray[np.int64]

    def row_spans(self) -> list[tuple[Span, ...]]:
        """Where the tokens of each row are, in order."""
        stops = [segment.stop for segment in self.segments]
        found = []
        for last in self.last.tolist():
            segment = self.segments[bisect.bisect_right(stops, last)]
            found.append(_join(segment.before, (segment.start, last + 1)))
        return found


def pack_rows(rows: Sequence[NDArray[np.int32]]) -> Pack:
    """The rows, at least one and none empty, as one sequence. Their order is free."""
    keys = [sort_key(row) for row in rows]
    parts: list[NDArray[np.int32]] = []
    positions: list[NDArray[np.int64]] = []
    segments: list[Segment] = []
    last = np.zeros(len(rows), np.int64)
    previous = np.zeros(0, np.int32)
    path: tuple[Span, ...] = ()
    stop = 0
    for index in sorted(range(len(rows)), key=keys.__getitem__):
        row = rows[index]
        shared = num_shared(previous, row)
        path = _cut_path(path, shared)
        if shared < len(row):
            start, stop = stop, stop + len(row) - shared
            if path and path[-1][1] == start:
                # It goes on where the row before it ends: the same segment, longer.
                segments[-1] = dataclasses.replace(segments[-1], stop=stop)
            else:
                segments.append(Segment(start=start, stop=stop, before=path))
            parts.append(row[shared:])
            positions.append(np.arange(shared, len(row), dtype=np.int64))
            path = _join(path, (start, stop))
        last[index] = path[-1][1] - 1
        previous = row
    return Pack(
        token_ids=np.concatenate(parts).astype(np.int64),
        positions=np.concatenate(positions),
        segments=tuple(segments),
        last=last,
    )


def round_up(number: int, max_step: int) -> int:
    """The next of few sizes: a multiple of `max_step`, or of an eighth of the power of two below, where that is less.

    >>> [round_up(number, 32) for number in (1, 9, 100, 300, 1000)]
    [1, 9, 104, 320, 1024]
    """
    step = max(1, min(max_step, 1 << max(0, number.bit_length() - 4)))
    return -(-number // step) * step


def pad_pack(pack: Pack, num_tokens: int) -> Pack:
    """The pack with a segment of its own of token 0 behind it, which is of no row, so that it has `num_tokens`."""
    size = len(pack.token_ids)
    if num_tokens <= size:
        return pack
    more = (0, num_tokens - size)
    return dataclasses.replace(
        pack,
        token_ids=np.pad(pack.token_ids, more),
        # All at the start: rotary embeddings that adapt to the highest position must not see one that is not there.
        positions=np.pad(pack.positions, more),
        segments=(*pack.segments, Segment(start=size, stop=num_tokens)),
    )


def _cut_path(path: tuple[Span, ...], length: int) -> tuple[Span, ...]:
    """The first `length` tokens of a path."""
    kept: list[Span] = []
    for start, stop in path:
        if length <= 0:
            break
        kept.append((start, min(stop, start + length)))
        length -= stop - start
    return tuple(kept)


def _join(path: tuple[Span, ...], span: Span) -> tuple[Span, ...]:
    """The path and what follows, as one span where they touch."""
    if path and path[-1][1] == span[0]:
        return (*path[:-1], (path[-1][0], span[1]))
    return (*path, span)
