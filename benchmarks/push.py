"""A dense push against a raw TCP socket pair that fills the same kind of shared memory with the same bytes.

Three processes, as there would be: a trainer, a replica (the real server, but for its engine), and one that only reads
a socket into shared memory. The trainer pushes and sends in turn, so that a slow minute of the machine hits both.

The figure takes the time of the chunk stream, from its first message until the replica has answered that everything is
in the staging copy, every chunk's checksum compared. What the transaction adds (the digest over the complete weights on
both sides, staging, activation) stands in the detail.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import IO, Any

from benchmarks.context import Context, Measured
from benchmarks.figures import paired_ratio

WEIGHTS_MIB = 1024
NUM_PAIRS = 9
_QUICK_MIB = 64
_TIMEOUT_S = 300


def run(context: Context) -> Measured:
    """Measures `dense_push_vs_raw_tcp`."""
    size_mib, num_pairs = (_QUICK_MIB, 1) if context.quick else (WEIGHTS_MIB, NUM_PAIRS)
    with ExitStack() as stack:
        replica = stack.enter_context(_side(context.directory, "replica", str(size_mib)))
        sink = stack.enter_context(_side(context.directory, "sink", str(size_mib)))
        arguments = [str(size_mib), str(num_pairs), replica["address"], str(replica["pid"]), sink["address"]]
        trainer = stack.enter_context(_side(context.directory, "trainer", *arguments))
        memory = {
            # Before: the weights (a replica has a serving and a staging copy), interpreter and libraries.
            "replica_resident_before_mib": replica["resident_mib"],
            "replica_high_water_mib": status_mib(replica["pid"], "VmHWM"),
            "trainer_resident_before_mib": trainer["resident_mib"],
            "trainer_high_water_mib": trainer["high_water_mib"],
        }
    ratio = paired_ratio(trainer["raw_s"], trainer["stream_s"])
    whole = paired_ratio(trainer["raw_s"], trainer["publish_s"])
    num_bytes = size_mib * 2**20
    return Measured(
        figures={"dense_push_vs_raw_tcp": ratio.median},
        detail={
            "weights_mib": size_mib,
            "ratio": vars(ratio),
            "ratio_of_whole_publication": vars(whole),
            "raw_gb_per_s": [round(num_bytes / 1e9 / seconds, 3) for seconds in trainer["raw_s"]],
            "push_gb_per_s": [round(num_bytes / 1e9 / seconds, 3) for seconds in trainer["stream_s"]],
            "publication_seconds": [round(seconds, 4) for seconds in trainer["publish_s"]],
            "stage_seconds": [round(seconds, 4) for seconds in trainer["stage_s"]],
            "cpu_seconds_per_gb": {
                side: round(median(trainer[f"{side}_cpu_s"]) / (num_bytes / 1e9), 3) for side in ("trainer", "replica")
            },
            "memory": {name: round(value, 1) for name, value in memory.items()},
        },
    )


def status_mib(pid: int, field: str) -> float:
    """A field of /proc/PID/status: VmRSS, what is resident, shared memory included, or VmHWM, the most that was."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    found = next(line for line in lines if line.startswith(f"{field}:"))
    return int(found.split()[1]) / 1024


@contextmanager
def _side(directory: Path, role: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """A process of `push_sides`, and the line of JSON that it wrote."""
    log = directory / f"{role}.log"
    command = [sys.executable, "-m", "benchmarks.push_sides", role, *arguments]
    with log.open("wb") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
        assert process.stdout is not None
        try:
            yield {"pid": process.pid, **_first_line(process.stdout, log)}
        finally:
            process.kill()


def _first_line(stream: IO[bytes], log: Path) -> dict[str, Any]:
    line = stream.readline()
    if not line:
        raise RuntimeError(f"a side of the benchmark ended early:\n{log.read_text(errors='replace')[-4000:]}")
    return dict(json.loads(line))
