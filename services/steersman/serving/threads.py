"""Calls of a model side by side on a CPU, each with a share of the threads.

One operator after the other on all cores leaves cores idle: between large products, operators are too small to be worth
a second thread, and Python runs on one. Calls that compute side by side, a core each, fill them.

`torch.set_num_threads` sets two things: OpenMP's number for the calling thread, and what threads get that are yet to
use torch. Here only the first is wanted.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch

# Calls side by side unless told otherwise: each has its own batch, and a quarter of a batch is still enough to compute.
MAX_DEFAULT_CALLS: Final = 4

_LOCK = threading.Lock()


def default_calls(device_type: str, num_threads: int) -> int:
    """How many calls to run side by side on a kind of torch device, with so many threads for all of them."""
    return min(MAX_DEFAULT_CALLS, num_threads) if device_type == "cpu" else 1


class ThreadShares:
    """Divides `num_threads` between `num_calls`. With one call, nothing is touched."""

    def __init__(self, num_threads: int, num_calls: int) -> None:
        self._whole = num_threads
        self._share = max(1, num_threads // num_calls)
        self._divides = num_calls > 1
        self._lock = threading.Lock()
        self._num_running = 0

    @contextmanager
    def take(self, *, may_take_all: bool) -> Iterator[None]:
        """The block's operators use one share, or all threads if it may, and nothing else runs when it starts."""
        with self._lock:
            alone = self._num_running == 0
            self._num_running += 1
        try:
            if self._divides:
                set_own_threads(self._whole if alone and may_take_all else self._share)
            yield
        finally:
            with self._lock:
                self._num_running -= 1


def set_own_threads(num_threads: int) -> None:
    """Sets the threads of torch's operators for the calling thread, and for no other, not even those to come."""
    if torch.get_num_threads() == num_threads:
        return
    with _LOCK:
        for_others: list[int] = []
        _on_new_thread(lambda: for_others.append(torch.get_num_threads()))
        torch.set_num_threads(num_threads)
        _on_new_thread(lambda: torch.set_num_threads(for_others[0]))


def _on_new_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
