"""The allocator's settings, in a process of their own: they hold for as long as a process lives."""

import platform
import subprocess
import sys

import pytest

from steersman.wire import allocator

# Counts blocks that are mappings of their own (<malloc.h>: hblks, the fourth field of mallinfo2).
PROGRAM = """
import ctypes, sys
from steersman.wire.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()

class MallInfo(ctypes.Structure):
    _fields_ = [(f"field_{index}", ctypes.c_size_t) for index in range(10)]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = MallInfo
libc.malloc.restype = ctypes.c_void_p
before = libc.mallinfo2().field_3
small, large = libc.malloc(ctypes.c_size_t(8 << 20)), libc.malloc(ctypes.c_size_t(256 << 20))
print(libc.mallinfo2().field_3 - before)
"""


def num_mappings(mode: str) -> int:
    """How many blocks, of one of 8 and one of 256 MiB, are mappings of their own."""
    finished = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    return int(finished.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_messages_come_from_the_heap_and_large_tensors_do_not() -> None:
    assert num_mappings("default") == 2
    assert num_mappings("kept") == 1


def test_without_glibc_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)
    assert not allocator.keep_freed_memory()
