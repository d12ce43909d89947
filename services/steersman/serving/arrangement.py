"""In which order a batcher runs what waits, and where it cuts: by length for models that pad, by beginning for those
that compute a common beginning once and pad nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from steersman.serving.batch_settings import BatchingSettings
from steersman.serving.prefixes import num_shared, sort_key

ItemT = TypeVar("ItemT")
ItemT_contra = TypeVar("ItemT_contra", contravariant=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """The next `num_items` are a batch; it computes so much padding, and so many tokens once for several items."""

    num_items: int
    num_padding_tokens: int = 0
    num_shared_tokens: int = 0


class Arrangement(Protocol[ItemT_contra]):
    """How a model likes its batches. Called with a lock held: must be quick, and must not raise."""

    def order(self, items: Sequence[ItemT_contra], num_tokens: Sequence[int]) -> list[int]:
        """Indices of the items of a wave in the order in which to run them."""
        ...

    def cut(self, items: Sequence[ItemT_contra], num_tokens: Sequence[int], settings: BatchingSettings) -> Cut:
        """How many of the next items, given in that order, to run as one batch: at least 1, at most all."""
        ...


class ByLength:
    """Longest first; every item of a batch is padded to the longest."""

    def order(self, items: Sequence[object], num_tokens: Sequence[int]) -> list[int]:
        """See `Arrangement.order`."""
        return sorted(range(len(num_tokens)), key=num_tokens.__getitem__, reverse=True)

    def cut(self, items: Sequence[object], num_tokens: Sequence[int], settings: BatchingSettings) -> Cut:
        """See `Arrangement.cut`. As many as the budget holds with their padding, and as are worth padding."""
        limit = max(1, settings.batch_tokens // max(1, num_tokens[0]))
        keep = worth_padding(num_tokens[:limit], settings.batch_overhead_tokens)
        return Cut(num_items=keep, num_padding_tokens=num_tokens[0] * keep - sum(num_tokens[:keep]))


class ByPrefix(Generic[ItemT]):
    """Items with a common beginning side by side, whoever sent them; a batch computes it once, and pads nothing."""

    def __init__(self, row_of: Callable[[ItemT], NDArray[np.int32]]) -> None:
        """`row_of` gives the token ids of an item, which are as many as its tokens."""
        self._row_of = row_of

    def order(self, items: Sequence[ItemT], num_tokens: Sequence[int]) -> list[int]:
        """See `Arrangement.order`."""
        keys = [sort_key(self._row_of(item)) for item in items]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def cut(self, items: Sequence[ItemT], num_tokens: Sequence[int], settings: BatchingSettings) -> Cut:
        """See `Arrangement.cut`.

        The budget counts what is computed. A batch may end before it is full: what the first item of the next batch
        shares with the last of this one is computed twice, and is part of what a batch costs besides its own tokens.
        The end with the lowest cost a token is taken.
        """
        rows = [self._row_of(items[0])]
        computed, shared = len(rows[0]), 0
        best, best_cost = Cut(num_items=1), float("inf")
        for item in items[1:]:
            rows.append(self._row_of(item))
            common = num_shared(rows[-2], rows[-1])
            cost = (settings.batch_overhead_tokens + common) / computed
            if cost <= best_cost:
                best, best_cost = Cut(num_items=len(rows) - 1, num_shared_tokens=shared), cost
            computed += len(rows[-1]) - common
            shared += common
            if computed > settings.batch_tokens:
                return best
        return Cut(num_items=len(rows), num_shared_tokens=shared)


def worth_padding(lengths: Sequence[int], overhead_tokens: int) -> int:
    """How many of `lengths` (descending) to run as one batch, when each batch costs `overhead_tokens` besides.

    Splitting at i pads the items from i on to `lengths[i]` rather than to `lengths[0]`. The best split is taken if it
    saves more than a batch costs.
    """
    best, best_saving = len(lengths), overhead_tokens
    for index in range(1, len(lengths)):
        saving = (lengths[0] - lengths[index]) * (len(lengths) - index)
        if saving > best_saving:
            best, best_saving = index, saving
    return best
