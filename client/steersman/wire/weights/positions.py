"""Where elements changed: the search, and positions as gaps of one byte or as a bitmap.

The gap before a change is the number of unchanged elements since the change before (or since the start). A byte of
0 to 254 is a gap and ends it; 255 adds 255 unchanged elements and goes on.

    >>> encode_gaps(np.array([0, 254, 255, 600])).tolist()
    [0, 254, 255, 0, 255, 255, 90]

Where more than half has changed, a bitmap is shorter: no code for a gap is shorter than one bit.
"""

from collections.abc import Iterator
from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steersman.wire.weights.errors import bad_chunk

BLOCK_BYTES: Final = 512 * 1024
"""Of each of the two arrays that are compared. Smaller ones pay for numpy's calls, larger ones gain nothing."""
SKIP: Final = 255
_DECODE_BLOCK: Final = 32 * 1024
"""Bytes of gaps or bits of a bitmap that are read at a time: what they unfold to stays in the cache."""

_WORD_STARTS: Final = np.arange(BLOCK_BYTES // 8, dtype=np.int64) * 8
_WORD_STARTS.setflags(write=False)
_COUNT_UP: Final = np.arange(1, _DECODE_BLOCK + 1, dtype=np.int64)
_COUNT_UP.setflags(write=False)


class Coding(IntEnum):
    """How positions are written."""

    GAPS = 0
    BITMAP = 1


def new_mask(item_bytes: int) -> NDArray[np.bool_]:
    """Scratch memory for `changed_in_block`, a whole number of 8-byte words."""
    return np.zeros(BLOCK_BYTES // item_bytes, np.bool_)


def true_positions(mask: NDArray[np.bool_], size: int) -> NDArray[np.int64]:
    """Ascending positions of what is true among the first `size` of `mask`, whose length is a multiple of 8.

    In two levels, words of eight and then the words that are not empty: numpy's search mispredicts a branch for each
    hit below one in ten, and has a branchless form above; either level is mostly above.
    """
    padded = -(-size // 8) * 8
    mask[size:padded] = False
    words = mask[:padded].view(np.uint64)
    word = np.flatnonzero(words != 0)
    found: NDArray[np.int64] = np.flatnonzero(words.take(word).view(np.bool_))
    # found counts within the chosen words; shift each to where its word lies.
    word <<= 3
    word -= _WORD_STARTS[: word.size]
    found += word.take(found >> 3)
    return found


def changed_in_block(base: NDArray[Any], new: NDArray[Any], scratch: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Positions at which two blocks differ in any bit. Integer views of at most BLOCK_BYTES."""
    np.not_equal(base, new, out=scratch[: base.size])
    return true_positions(scratch, base.size)


def encode_gaps(gaps: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Gaps as bytes."""
    if gaps.size == 0 or gaps.max() < SKIP:
        return gaps.astype(np.uint8)
    skips = gaps // SKIP
    ends = np.cumsum(skips + 1) - 1
    encoded = np.full(int(ends[-1]) + 1, SKIP, np.uint8)
    encoded[ends] = gaps - skips * SKIP
    return encoded


class PositionWriter:
    """Collects ascending positions, block after block."""

    def __init__(self) -> None:
        self._pieces: list[NDArray[np.uint8]] = []
        self._last = -1
        self._count = 0

    def add(self, positions: NDArray[np.int64]) -> None:
        """Adds positions that lie behind all before."""
        if positions.size == 0:
            return
        gaps = np.empty_like(positions)
        np.subtract(positions[1:], positions[:-1], out=gaps[1:])
        gaps[0] = positions[0] - self._last
        gaps -= 1
        self._pieces.append(encode_gaps(gaps))
        self._last = int(positions[-1])
        self._count += positions.size

    def finish(self, num_elements: int) -> tuple[Coding, bytes]:
        """All positions, and how they are written. `num_elements` is how many there could have been."""
        return finish_gaps(b"".join(piece.tobytes() for piece in self._pieces), self._count, num_elements)


def finish_gaps(gaps: bytes, count: int, num_elements: int) -> tuple[Coding, bytes]:
    """How `count` of `num_elements` positions are written, of which these are the gaps."""
    if 2 * count <= num_elements:
        return Coding.GAPS, gaps
    is_changed = np.zeros(num_elements, np.bool_)
    for block in iter_positions(Coding.GAPS, np.frombuffer(gaps, np.uint8)):
        is_changed[block] = True
    return Coding.BITMAP, np.packbits(is_changed, bitorder="little").tobytes()


def section_bounds(name: str, coding: int, num_changes: int, num_elements: int) -> tuple[int, int]:
    """Least and largest length of written positions. WEIGHT_CHUNK_INVALID naming `name` for an unknown coding."""
    if coding == Coding.GAPS:
        return num_changes, num_changes + num_elements // SKIP
    if coding == Coding.BITMAP:
        return -(-num_changes // 8), -(-num_elements // 8)
    raise bad_chunk(name, f"coding {coding}", "0 (gaps) or 1 (bitmap)")


def check_positions(name: str, coding: int, section: NDArray[np.uint8], num_changes: int, num_elements: int) -> None:
    """Raises WEIGHT_CHUNK_INVALID naming `name` unless these are `num_changes` positions below `num_elements`."""
    if coding == Coding.GAPS:
        found = int(np.count_nonzero(section != SKIP))
        reach = int(section.sum(dtype=np.int64)) + num_changes
        if section.size and section[-1] == SKIP:
            raise bad_chunk(name, "a skip at the end", "a gap")
    else:
        found = int(np.bitwise_count(section).sum(dtype=np.int64))
        reach = 8 * (section.size - 1) + int(section[-1]).bit_length() if section.size else 0
    if found != num_changes:
        raise bad_chunk(name, f"{found} positions", f"{num_changes}")
    if reach > num_elements:
        raise bad_chunk(name, f"positions up to {reach - 1}", f"below {num_elements}")


def iter_positions(coding: int, section: NDArray[np.uint8]) -> Iterator[NDArray[np.int64]]:
    """Ascending positions of a checked section, in blocks that fit the cache."""
    return _iter_gaps(section) if coding == Coding.GAPS else _iter_bitmap(section)


def _iter_bitmap(bitmap: NDArray[np.uint8]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, bitmap.size, _DECODE_BLOCK // 8):
        bits = np.unpackbits(bitmap[start : start + _DECODE_BLOCK // 8], bitorder="little")
        positions = np.flatnonzero(bits.view(np.bool_))
        positions += 8 * start
        if positions.size:
            yield positions


def _iter_gaps(gaps: NDArray[np.uint8]) -> Iterator[NDArray[np.int64]]:
    last = -1
    for start in range(0, gaps.size, _DECODE_BLOCK):
        block = gaps[start : start + _DECODE_BLOCK]
        positions = np.cumsum(block, dtype=np.int64)
        ends = block != SKIP
        if ends.all():
            positions += _COUNT_UP[: block.size]
            positions += last
            last = int(positions[-1])
        else:
            # A skip moves on by 255 alone, a gap by one more: for the change itself.
            advance = int(positions[-1])
            positions = positions[ends]
            positions += _COUNT_UP[: positions.size]
            positions += last
            last += advance + positions.size
        if positions.size:
            yield positions
