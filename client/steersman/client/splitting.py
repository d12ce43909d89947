"""Cuts a large batch into calls that the services accept."""

from collections.abc import Sequence
from typing import Final

from steersman.wire.limits import MAX_BATCH_ITEMS, MIB

# Far below the message limit: parts of this size spread over replicas, and a lost one costs little.
MAX_PART_BYTES: Final = 8 * MIB
MAX_PART_ITEMS: Final = MAX_BATCH_ITEMS // 4
# Parts under way at once. Enough to keep a batching server busy without holding its whole queue.
MAX_PARTS_IN_FLIGHT: Final = 8


def split(sizes: Sequence[int], *, max_items: int = MAX_PART_ITEMS, max_bytes: int = MAX_PART_BYTES) -> list[range]:
    """Cuts items of the given sizes in bytes into consecutive parts within both limits.

    An item larger than `max_bytes` gets a part of its own: whether it is too large is the server's to say.

        >>> split([4, 4, 4, 9, 1], max_items=2, max_bytes=8)
        [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    """
    parts: list[range] = []
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and (index - start == max_items or total + size > max_bytes):
            parts.append(range(start, index))
            start, total = index, 0
        total += size
    if start < len(sizes):
        parts.append(range(start, len(sizes)))
    return parts
