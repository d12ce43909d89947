"""What glibc's allocator does with memory that is freed.

A stream of 1 MiB messages takes and frees tens of thousands of blocks a minute, each of them by default a mapping of
its own, or the top of a heap that is given back at once: the kernel then zeroes every page again, which costs more than
copying the message does. See docs/adr/0008-chunks-past-protobuf-and-the-allocator.md.
"""

import ctypes
import platform
from typing import Final

_MIB: Final = 1024 * 1024
# <malloc.h>: parameter, value. All three are needed: each alone leaves one of the ways back to the kernel open.
_OPTIONS: Final = {
    # Smaller blocks come from a heap. Where glibc's own adaptation would end; a tensor above it is still given back.
    "M_MMAP_THRESHOLD": (-3, 32 * _MIB),
    # What a heap grows by, and the heaps of threads (64 MiB at most) keep as long as they live.
    "M_TOP_PAD": (-2, 64 * _MIB),
    # Free memory at the end of the main heap from which on it is given back.
    "M_TRIM_THRESHOLD": (-1, 128 * _MIB),
}


def keep_freed_memory() -> bool:
    """Has this process keep freed blocks below 32 MiB for their next use. Call it before threads are started.

    Returns whether that could be set: False without glibc, where nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    taken = [mallopt(parameter, value) for parameter, value in _OPTIONS.values()]
    return all(taken)
