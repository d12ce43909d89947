"""Host memory that other processes of the same user can map."""

import contextlib
import mmap
import os
from pathlib import Path

from steersman.policy.engine.port import HostWeights
from steersman.policy.weights.manifest import HostManifest


class HostCopy:
    """Room for one complete set of weights.

    The memory is an anonymous file: it needs no free space under /dev/shm (64 MiB in many containers),
    counts as this process's own, and is gone when the last process that maps it ends, however it ends.
    """

    def __init__(self, manifest: HostManifest) -> None:
        """Takes and pre-faults the memory. Raises `MemoryError` if the host has too little."""
        if manifest.nbytes > (available := _available_bytes()):
            # The kernel would rather end some process than refuse.
            raise MemoryError(f"{manifest.nbytes} bytes of host memory for weights, available are {available}")
        self._manifest = manifest
        self._file = os.memfd_create("steersman-weights", os.MFD_CLOEXEC)
        try:
            # Taking it now turns a lack of memory into an error here instead of a crash at the first write.
            os.posix_fallocate(self._file, 0, manifest.nbytes)
            self._map = mmap.mmap(self._file, manifest.nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            os.close(self._file)
            raise MemoryError(f"{manifest.nbytes} bytes of host memory for weights: {error}") from error
        self.bytes = memoryview(self._map)

    @property
    def weights(self) -> HostWeights:
        """How an engine finds this copy."""
        path = Path("/proc") / str(os.getpid()) / "fd" / str(self._file)
        return HostWeights(path=str(path), nbytes=self._manifest.nbytes, slots=self._manifest.slots)

    def close(self) -> None:
        """Gives the memory back, as far as this process is concerned."""
        self.bytes.release()
        self._map.close()
        os.close(self._file)


def _available_bytes() -> int:
    """What the host and the container of this process still have."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no limit: no file, or the word "max"
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        available = min(available, limit - used + int(stat["inactive_file"]))
    return available
