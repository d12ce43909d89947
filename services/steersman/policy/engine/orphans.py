"""No engine process outlives the service that started it.

vLLM's engine core does not notice that its frontend was killed: it would keep its memory, its cores and the sockets
it inherited, and a restarted service would find its ports taken. The kernel ends it instead (PR_SET_PDEATHSIG).
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


class _Fork:
    """Whose forks are engine processes now. `register_at_fork` cannot be undone."""

    registered = False
    parent_pid: int | None = None


def end_with_parent(parent_pid: int) -> None:
    """Lets the kernel end this process when its parent's thread that started it ends. Linux only."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            # It ended before we asked, and no signal will come.
            os._exit(1)


def end_with_parent_if_child() -> None:
    """The same, if multiprocessing started this process."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with_parent(parent.pid)


@contextlib.contextmanager
def forks_end_with_us() -> Iterator[None]:
    """Processes forked inside the block end when the calling thread ends."""
    if not _Fork.registered:
        os.register_at_fork(after_in_child=_after_fork)
        _Fork.registered = True
    _Fork.parent_pid = os.getpid()
    try:
        yield
    finally:
        _Fork.parent_pid = None


def _after_fork() -> None:
    if _Fork.parent_pid is not None:
        end_with_parent(_Fork.parent_pid)
        _Fork.parent_pid = os.getpid()  # an engine core forks workers in turn
