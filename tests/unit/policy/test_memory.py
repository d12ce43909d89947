"""Host copies are seen by other processes."""

import subprocess
import sys
from pathlib import Path

import pytest
from policy_fakes import MANIFEST

from steersman.policy.weights.manifest import HostManifest, TensorSpec
from steersman.policy.weights.memory import HostCopy


def test_another_process_reads_and_writes_the_same_bytes() -> None:
    copy = HostCopy(MANIFEST)
    try:
        copy.bytes[3] = 42
        program = (
            "import mmap, os, sys; m = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0);"
            "assert m[3] == 42 and len(m) == int(sys.argv[2]); m[4] = 43"
        )
        arguments = [copy.weights.path, str(copy.weights.nbytes)]
        subprocess.run([sys.executable, "-c", program, *arguments], check=True, timeout=30)
        assert copy.bytes[4] == 43
    finally:
        copy.close()


def test_the_memory_is_gone_after_close() -> None:
    copy = HostCopy(MANIFEST)
    path = copy.weights.path
    copy.close()
    assert not Path(path).exists()


def test_too_little_memory_is_an_error() -> None:
    huge = HostManifest.of([TensorSpec(name="t", shape=(1 << 60,), dtype="float32")])
    with pytest.raises(MemoryError, match="host memory for weights"):
        HostCopy(huge)
