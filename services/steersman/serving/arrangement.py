"""Which batches a batcher makes of what waits: by length for models that pad, by beginning for those that compute a
common beginning once and pad nothing.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from steersman.serving.batch_settings import MIN_BATCH_TOKENS, BatchingSettings
from steersman.serving.prefixes import num_shared, sort_key

ItemT = TypeVar("ItemT")
ItemT_contra = TypeVar("ItemT_contra", contravariant=True)

# With several workers, smaller batches are tried too, in eighths of the budget: they may divide better.
_EIGHTHS: Final = (7, 6, 5, 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """What a batch computes besides the tokens of its items: padding; and what it computes once for several items."""

    num_padding_tokens: int = 0
    num_shared_tokens: int = 0


class Arrangement(Protocol[ItemT_contra]):
    """How a model likes its batches. Called with a lock held: must be quick, and must not raise."""

    def plan(
        self, items: Sequence[ItemT_contra], num_tokens: Sequence[int], settings: BatchingSettings, num_workers: int = 1
    ) -> list[list[int]]:
        """Indices of the items of each batch, in the order in which to run them; none is empty.

        Together they are all items. Several workers, who take them in turn, come to the end together if they can.
        """
        ...

    def count(self, items: Sequence[ItemT_contra], num_tokens: Sequence[int]) -> Tally:
        """What a batch of these items computes. Some of a batch as planned may be gone when it is run."""
        ...


class ByLength:
    """Longest first; every item of a batch is padded to the longest."""

    def plan(
        self, items: Sequence[object], num_tokens: Sequence[int], settings: BatchingSettings, num_workers: int = 1
    ) -> list[list[int]]:
        """See `Arrangement.plan`. As many as the budget holds with their padding, and as are worth padding."""
        order = sorted(range(len(num_tokens)), key=num_tokens.__getitem__, reverse=True)
        lengths = [num_tokens[index] for index in order]

        def cut(budget: int) -> list[_Part]:
            parts, start = [], 0
            while start < len(lengths):
                limit = min(settings.max_batch_items, max(1, budget // max(1, lengths[start])))
                keep = worth_padding(lengths[start : start + limit], settings.batch_overhead_tokens)
                parts.append(_Part(start, start + keep, lengths[start] * keep))
                start += keep
            return parts

        return [order[part.start : part.stop] for part in _divide(cut, settings, num_workers)]

    def count(self, items: Sequence[object], num_tokens: Sequence[int]) -> Tally:
        """See `Arrangement.count`."""
        return Tally(num_padding_tokens=max(num_tokens) * len(num_tokens) - sum(num_tokens))


class ByPrefix(Generic[ItemT]):
    """Items with a common beginning side by side, whoever sent them; a batch computes it once, and pads nothing."""

    def __init__(self, row_of: Callable[[ItemT], NDArray[np.int32]]) -> None:
        """`row_of` gives the token ids of an item, which are as many as its tokens."""
        self._row_of = row_of

    def plan(
        self, items: Sequence[ItemT], num_tokens: Sequence[int], settings: BatchingSettings, num_workers: int = 1
    ) -> list[list[int]]:
        """See `Arrangement.plan`.

        The budget counts what is computed. A batch may end before it is full: what the first item of the next batch
        shares with the last of this one is computed twice, and is part of what a batch costs besides its own tokens.
        The end with the lowest cost a token is taken.
        """
        rows = [self._row_of(item) for item in items]
        keys = [sort_key(row) for row in rows]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        rows = [rows[index] for index in order]
        commons = [0, *map(num_shared, rows, rows[1:])]

        def cut(budget: int) -> list[_Part]:
            parts, start = [], 0
            while start < len(rows):
                parts.append(_next_by_prefix(rows, commons, start, budget, settings))
                start = parts[-1].stop
            return parts

        return [order[part.start : part.stop] for part in _divide(cut, settings, num_workers)]

    def count(self, items: Sequence[ItemT], num_tokens: Sequence[int]) -> Tally:
        """See `Arrangement.count`."""
        rows = [self._row_of(item) for item in items]
        return Tally(num_shared_tokens=sum(map(num_shared, rows, rows[1:])))


@dataclass(frozen=True, slots=True)
class _Part:
    """A batch of the items `start` to `stop` in their order, which computes so many tokens."""

    start: int
    stop: int
    num_computed: int


def _next_by_prefix(
    rows: Sequence[NDArray[np.int32]], commons: Sequence[int], start: int, budget: int, settings: BatchingSettings
) -> _Part:
    """The batch that begins at `start`; `commons` is what each row shares with the one before it."""
    computed = len(rows[start])
    best, best_cost = _Part(start, start + 1, computed), float("inf")
    limit = min(len(rows), start + settings.max_batch_items)
    for stop in range(start + 1, limit):
        cost = (settings.batch_overhead_tokens + commons[stop]) / computed
        if cost <= best_cost:
            best, best_cost = _Part(start, stop, computed), cost
        computed += len(rows[stop]) - commons[stop]
        if computed > budget:
            return best
    return _Part(start, limit, computed)


def _divide(cut: Callable[[int], list[_Part]], settings: BatchingSettings, num_workers: int) -> list[_Part]:
    """The batches that `cut` makes within a budget; with several workers those that are done first, largest first."""
    whole = cut(settings.batch_tokens)
    if num_workers == 1:
        return whole
    even = -(-sum(part.num_computed for part in whole) // num_workers)
    smaller = {even, *(settings.batch_tokens * eighths // 8 for eighths in _EIGHTHS)}
    budgets = {min(settings.batch_tokens, max(MIN_BATCH_TOKENS, budget)) for budget in smaller}
    plans = [whole, *(cut(budget) for budget in sorted(budgets, reverse=True))]

    def finish(parts: list[_Part]) -> int:
        """Tokens until the last worker is done, each taking the next batch as soon as it can."""
        workers = [0] * num_workers
        for part in parts:
            heapq.heapreplace(workers, workers[0] + part.num_computed + settings.batch_overhead_tokens)
        return max(workers)

    return min((sorted(parts, key=lambda part: -part.num_computed) for parts in plans), key=finish)


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
