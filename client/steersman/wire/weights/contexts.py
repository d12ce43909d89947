"""Classes of elements by the magnitude of their old value: what makes the compact profile compact.

An optimiser moves weights by about the learning rate whatever their size, while the spacing of floats doubles with each
exponent: small weights change often and by several ulps, large ones seldom and by one. Both sides know the old value,
so gaps can be counted within a class (the changed elements' ranks among the members of their class) and each class
gets codes of its own, at no cost in side information but the thresholds.

Class c holds elements whose magnitude bits m satisfy thresholds[c - 1] <= m < thresholds[c]. 2-byte elements only.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steersman.wire.weights.positions import BLOCK_BYTES, new_mask, true_positions

MAX_CLASSES: Final = 4
"""Halves what is left to gain over one class each time it doubles; time grows with it."""
_CONTEXT_SHIFT: Final = 7
"""Contexts are bfloat16's exponents (float16's exponents with three bits of mantissa)."""
_NUM_CONTEXTS: Final = 256
_MAX_SAMPLES: Final = 1 << 16
_CLASS_COST_BITS: Final = 8 * 300
"""Section tables and code tables that a further class brings."""

_MAGNITUDE: Final = np.int16(0x7FFF)
_BLOCK: Final = BLOCK_BYTES // 2


def choose_thresholds(base: NDArray[np.int16], old: NDArray[np.int16], is_large_step: NDArray[np.bool_]) -> list[int]:
    """Thresholds that make gaps and step sizes cheapest, by the entropy of each class; [] for a single class.

    `base` are all old values, `old` those of the changed elements, `is_large_step` whether these moved by more than
    one ulp.
    """
    stride = max(1, base.size // _MAX_SAMPLES)
    changed_context = (old & _MAGNITUDE) >> _CONTEXT_SHIFT
    changed = np.bincount(changed_context, minlength=_NUM_CONTEXTS)
    large = np.bincount(changed_context[is_large_step], minlength=_NUM_CONTEXTS)
    members = np.bincount((base[::stride] & _MAGNITUDE) >> _CONTEXT_SHIFT, minlength=_NUM_CONTEXTS) * stride
    members = np.maximum(members, changed)

    edges = np.concatenate([[0], np.flatnonzero(members) + 1])
    totals = [np.concatenate([[0], np.cumsum(counts)])[edges] for counts in (members, changed, large)]
    # bits[i, j]: what a class of contexts edges[i] to edges[j] costs.
    spans = [total[None, :] - total[:, None] for total in totals]
    bits = _binary_entropy_bits(spans[0], spans[1]) + _binary_entropy_bits(spans[1], spans[2]) + _CLASS_COST_BITS
    bits[np.tril_indices(edges.size)] = np.inf
    return [int(edges[cut]) << _CONTEXT_SHIFT for cut in _cheapest_cuts(bits)]


def _binary_entropy_bits(total: NDArray[np.int64], ones: NDArray[np.int64]) -> NDArray[np.float64]:
    """Bits that say which `ones` of `total` are set, at their own density."""
    total, ones = np.maximum(total, 0), np.maximum(ones, 0)
    zeros = total - ones
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = -(ones * np.log2(ones / total) + zeros * np.log2(zeros / total))
    return np.nan_to_num(bits, nan=0.0, posinf=0.0, neginf=0.0)


def _cheapest_cuts(bits: NDArray[np.float64]) -> list[int]:
    """Inner edges of the cheapest partition into at most MAX_CLASSES classes, by dynamic programming."""
    last = bits.shape[0] - 1
    cost = bits[0]
    cuts: list[list[int]] = [[] for _ in range(last + 1)]
    best_cost, best_cuts = cost[last], cuts[last]
    for _ in range(1, MAX_CLASSES):
        through = cost[:, None] + bits
        previous = through.argmin(axis=0)
        cost = through.min(axis=0)
        cuts = [[*cuts[before], int(before)] for before in previous]
        if cost[last] < best_cost:
            best_cost, best_cuts = cost[last], cuts[last]
    return best_cuts


class ClassMasks:
    """Which elements of a block belong to which class. The masks live until the next block."""

    def __init__(self, thresholds: Sequence[int]) -> None:
        self._thresholds = thresholds
        self._masks = [new_mask(2) for _ in range(len(thresholds) + 1)]

    def of(self, block: NDArray[np.int16]) -> list[NDArray[np.bool_]]:
        """One mask for each class, longer than the block where that is not of full size."""
        size, magnitudes = block.size, block & _MAGNITUDE
        self._masks[-1][:size] = True
        for mask, threshold in zip(self._masks, self._thresholds, strict=False):
            np.less(magnitudes, np.int16(threshold), out=mask[:size])
        # Each mask so far holds what lies below its class's upper end, the class below included.
        for upper, lower in zip(self._masks[:0:-1], self._masks[-2::-1], strict=True):
            upper[:size] ^= lower[:size]
        return self._masks


def ranks_in_class(mask: NDArray[np.bool_], positions: NDArray[Any], size: int) -> tuple[NDArray[np.int64], int]:
    """How many members of a class lie before each of `positions`; how many the first `size` elements hold in all."""
    mask[size:] = False
    words = np.packbits(mask, bitorder="little").view("<u8")
    through = np.cumsum(np.bitwise_count(words), dtype=np.int64)
    word = positions >> 6
    own = words.take(word)
    # Members in the change's own word, from the change on, are not before it: shift the others out, then count.
    own >>= (positions & 63).astype(np.uint64)
    ranks = through.take(word)
    ranks -= np.bitwise_count(own)
    return ranks, int(through[-1])


def positions_of_ranks(
    span: NDArray[np.int16], thresholds: Sequence[int], ranks: Sequence[NDArray[np.int64]]
) -> tuple[list[NDArray[np.int64]], list[int]]:
    """Where the members of these ranks lie, for each class, and how many members each class has.

    Ranks ascend. Those beyond the members of their class have no position: compare the lengths.
    """
    masks_of = ClassMasks(thresholds)
    pieces: list[list[NDArray[np.int64]]] = [[] for _ in ranks]
    passed, members = [0] * len(ranks), [0] * len(ranks)
    for start in range(0, span.size, _BLOCK):
        block = span[start : start + _BLOCK]
        for index, mask in enumerate(masks_of.of(block)):
            before = members[index]
            members[index] += int(np.count_nonzero(mask[: block.size]))
            stop = int(np.searchsorted(ranks[index], members[index]))
            if stop > passed[index]:
                inside = ranks[index][passed[index] : stop] - before
                # A class is mostly dense, where the plain search is the better one.
                is_dense = 8 * (members[index] - before) > block.size
                where = np.flatnonzero(mask[: block.size]) if is_dense else true_positions(mask, block.size)
                found = where.take(inside)
                found += start
                pieces[index].append(found)
                passed[index] = stop
    return [np.concatenate(found) if found else np.empty(0, np.int64) for found in pieces], members
