"""Which elements of a tensor have arrived."""

from bisect import bisect_left, bisect_right


class Coverage:
    """Disjoint spans of a range [0, size), merged where they touch; adding is logarithmic in their number.

    >>> coverage = Coverage(10)
    >>> coverage.add(4, 6), coverage.add(0, 4), coverage.add(5, 7)
    (True, True, False)
    >>> coverage.first_gap()
    6
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._starts: list[int] = []
        self._ends: list[int] = []

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any element of [start, end) is there."""
        after = bisect_left(self._starts, end)
        return start < end and after > 0 and self._ends[after - 1] > start

    def add(self, start: int, end: int) -> bool:
        """Adds [start, end). False, and nothing is added, if part of it is there already."""
        if start >= end:
            return True
        if self.overlaps(start, end):
            return False
        at = bisect_left(self._starts, start)
        if at < len(self._starts) and self._starts[at] == end:
            end = self._ends.pop(at)
            del self._starts[at]
        if at > 0 and self._ends[at - 1] == start:
            self._ends[at - 1] = end
        else:
            self._starts.insert(at, start)
            self._ends.insert(at, end)
        return True

    def discard(self, start: int, end: int) -> None:
        """Takes [start, end) away again, all of which must be there."""
        if start >= end:
            return
        at = bisect_right(self._starts, start) - 1
        assert at >= 0
        assert end <= self._ends[at]
        left, right = (self._starts[at], start), (end, self._ends[at])
        kept = [span for span in (left, right) if span[0] < span[1]]
        self._starts[at : at + 1] = [span[0] for span in kept]
        self._ends[at : at + 1] = [span[1] for span in kept]

    def first_gap(self) -> int | None:
        """The first element that is not there, None if all are."""
        if self._size == 0:
            return None
        if not self._starts or self._starts[0] > 0:
            return 0
        return None if self._ends[0] == self._size else self._ends[0]
