"""Two computations at once, each on half of the threads.

Operators of a small model are too short to be worth several threads: the threads wait for each other to begin and to
end, the longer the more processes share the cores. Two models that do not depend on each other share nothing but the
interpreter, which torch's operators let go.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

FirstT = TypeVar("FirstT")
SecondT = TypeVar("SecondT")


class SideBySide:
    """Runs pairs of computations; within :meth:`halves` at once if `enabled`, else one after the other."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._pool: ThreadPoolExecutor | None = None

    @contextmanager
    def halves(self) -> Iterator[None]:
        """Both threads have half of torch's threads inside, which is nothing to share where there is but one."""
        num_threads = torch.get_num_threads()
        if not self._enabled or num_threads < 2:
            yield
            return
        # torch keeps the number for each thread: what is set here does not reach the other one.
        share = num_threads // 2
        with ThreadPoolExecutor(1, "second-model", torch.set_num_threads, (share,)) as self._pool:
            self._pool.submit(torch.get_num_threads).result()
            torch.set_num_threads(num_threads - share)
            try:
                yield
            finally:
                self._pool = None
                torch.set_num_threads(num_threads)

    def run(self, first: Callable[[], FirstT], second: Callable[[], SecondT]) -> tuple[FirstT, SecondT]:
        """What both give. What torch keeps for each thread (gradients on or off, autocast) they set themselves.

        The first error of the two is raised when both have ended.
        """
        if self._pool is None:
            return first(), second()
        other = self._pool.submit(second)
        try:
            one = first()
        except BaseException:
            other.exception()
            raise
        return one, other.result()
