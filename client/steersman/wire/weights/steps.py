"""By how much elements changed: steps between neighbouring floats, on integers alone.

A float's bits, read as sign and magnitude, map one to one onto an integer that ascends with the float: -0 is just
below +0, the NaNs lie beyond the infinities. A step is the difference of two such integers, modulo 2^bits: +1 is the
next larger float (one ulp), and every bit pattern can be reached from every other. The bfloat16 weights that an
optimiser's update changes mostly move by one ulp.

Steps of 1 and 2 byte elements are written as four sections: sign bits of all; which of them are not +-1 (positions, see
`positions`); their magnitudes less 2 as bytes, 255 meaning "see wide"; and wide magnitudes in full.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steersman.wire.weights.errors import bad_chunk
from steersman.wire.weights.positions import Coding, PositionWriter, check_positions, iter_positions

_WIDE: Final = 255
_BLOCK: Final = 32 * 1024
"""Steps that are worked on at a time, in the cache; a multiple of 8, so that sign bits fill their bytes."""
_INTEGERS: Final[dict[int, np.dtype[Any]]] = {size: np.dtype(f"<i{size}") for size in (1, 2, 4, 8)}
_UNSIGNED: Final[dict[int, np.dtype[Any]]] = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}


def integers(array: NDArray[Any]) -> NDArray[Any]:
    """A flat contiguous array's bits as signed integers of the same size, without a copy."""
    return array.view(_INTEGERS[array.dtype.itemsize])


def ordered(bits: NDArray[Any]) -> NDArray[Any]:
    """Signed integers that ascend with the float of these bits. Its own inverse."""
    info = np.iinfo(bits.dtype)
    flipped = bits >> (info.bits - 1)
    flipped &= bits.dtype.type(info.max)
    flipped ^= bits
    return flipped


def steps_between(old: NDArray[Any], new: NDArray[Any]) -> NDArray[Any]:
    """Steps that lead from `old` to `new`, modulo 2^bits."""
    steps = ordered(new)
    steps -= ordered(old)
    return steps


def apply_steps(span: NDArray[Any], positions: NDArray[np.int64], steps: NDArray[Any]) -> None:
    """Moves the elements of `span` at `positions`, all within it and all different, by their steps."""
    moved = ordered(span.take(positions))
    moved += steps
    span[positions] = ordered(moved)


def encode_steps(steps: NDArray[Any]) -> tuple[Coding, list[bytes]]:
    """How the exceptions are coded, and the sections of steps that are not zero; see the module. Destroys `steps`."""
    signs, exceptions, large = [], PositionWriter(), [np.empty(0, _UNSIGNED[steps.itemsize])]
    for start in range(0, steps.size, _BLOCK):
        block = steps[start : start + _BLOCK]
        signs.append(np.packbits(block < 0, bitorder="little"))
        np.abs(block, out=block)  # the most negative integer stays itself: right when read as unsigned
        magnitudes = block.view(_UNSIGNED[steps.itemsize])
        where = np.flatnonzero(magnitudes != 1)
        large.append(magnitudes.take(where))
        where += start
        exceptions.add(where)
    coding, section = exceptions.finish(steps.size)
    all_large = np.concatenate(large)
    all_large -= 2
    wide = all_large[all_large >= _WIDE]
    wide += 2
    small = np.minimum(all_large, all_large.dtype.type(_WIDE)).astype(np.uint8)
    return coding, [np.concatenate(signs).tobytes(), section, small.tobytes(), wide.tobytes()]


class StepReader:
    """Reads steps in order. The constructor checks all of them.

    Raises WEIGHT_CHUNK_INVALID naming the section that contradicts another.
    """

    def __init__(
        self,
        *,
        num_changes: int,
        item_bytes: int,
        coding: int,
        signs: NDArray[np.uint8],
        exceptions: NDArray[np.uint8],
        magnitudes: NDArray[np.uint8],
        wide: NDArray[np.uint8],
    ) -> None:
        if num_changes % 8 and int(signs[-1]) >> num_changes % 8:
            raise bad_chunk("signs", "bits beyond the last change", "zero")
        check_positions("exceptions", coding, exceptions, magnitudes.size, num_changes)
        self._dtype = _INTEGERS[item_bytes]
        self._signs = signs
        self._at = 0
        self._large = _join_magnitudes(magnitudes, wide, _UNSIGNED[item_bytes]).view(self._dtype)
        self._at_large = 0
        where = list(iter_positions(coding, exceptions))
        self._where_large = np.concatenate(where) if where else np.empty(0, np.int64)

    def take(self, count: int) -> NDArray[Any]:
        """The next `count` steps."""
        first, end = self._at, self._at + count
        steps = np.ones(count, self._dtype)
        end_large = int(np.searchsorted(self._where_large, end))
        large = slice(self._at_large, end_large)
        steps[self._where_large[large] - first] = self._large[large]
        # x ^ -1 - -1 is -x: negates without a branch, and wraps where the magnitude is the largest.
        packed = self._signs[first // 8 : -(-end // 8)]
        bits = np.unpackbits(packed, bitorder="little")[first % 8 : first % 8 + count]
        negate = -bits.view(np.int8).astype(self._dtype)
        steps ^= negate
        steps -= negate
        self._at, self._at_large = end, end_large
        return steps


def _join_magnitudes(small: NDArray[np.uint8], wide: NDArray[np.uint8], dtype: np.dtype[Any]) -> NDArray[Any]:
    high = 1 << (8 * dtype.itemsize - 1)
    if small.size and int(small.max()) > min(_WIDE, high - 2):
        raise bad_chunk("magnitudes", f"steps of up to {int(small.max()) + 2}", f"at most {high}")
    is_wide = np.flatnonzero(small == _WIDE)
    if wide.size != is_wide.size * dtype.itemsize:
        raise bad_chunk("wide", f"{wide.size} bytes", f"{is_wide.size * dtype.itemsize}, as the magnitudes say")
    joined = small.astype(dtype)
    joined += dtype.type(2)
    if is_wide.size:
        values = np.frombuffer(wide.tobytes(), dtype)
        low = _WIDE + 2
        if int(values.min()) < low or int(values.max()) > high:
            raise bad_chunk("wide", f"magnitudes {values.min()} to {values.max()}", f"{low} to {high}")
        joined[is_wide] = values
    return joined


def encode_planes(steps: NDArray[Any]) -> list[bytes]:
    """Steps of wide elements, zigzag (0, -1, 1, -2 become 0, 1, 2, 3), one section for each byte of the number."""
    planes = np.empty((steps.itemsize, steps.size), np.uint8)
    for start in range(0, steps.size, _BLOCK):
        block = steps[start : start + _BLOCK]
        zigzag = (block << 1) ^ (block >> (8 * steps.itemsize - 1))
        planes[:, start : start + block.size] = zigzag.view(np.uint8).reshape(-1, steps.itemsize).T
    return [plane.tobytes() for plane in planes]


def decode_planes(planes: list[NDArray[np.uint8]]) -> NDArray[Any]:
    """Steps from the sections of `encode_planes`."""
    zigzag = np.stack(planes, axis=-1).view(_INTEGERS[len(planes)]).reshape(-1)
    unsigned = zigzag.view(_UNSIGNED[len(planes)]) >> 1
    steps: NDArray[Any] = unsigned.view(zigzag.dtype) ^ -(zigzag & 1)
    return steps
