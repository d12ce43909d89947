"""The files of a run folder that belong to the job rather than to its stage.

job.json      what was asked for, and which database to report to
lock          held (flock) by the one worker of the folder; the kernel frees it when the worker dies
log.txt       what the worker printed, all attempts
result.json   what the stage returned, written when the job succeeded
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from steersman.trainer.jobs.model import JobKind, JobResources, JobSpec

JOB_FILE: Final = "job.json"
LOCK_FILE: Final = "lock"
LOG_FILE: Final = "log.txt"
RESULT_FILE: Final = "result.json"

_TAIL_BYTES: Final = 16 * 1024


class FolderInUse(OSError):
    """Another worker holds the run folder."""


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """What a worker must know: its job, and the database it reports to, relative to the run folder."""

    job_id: str
    spec: JobSpec
    database: str


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a whole file or none: to a partial file first, then renamed."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_job_file(run_directory: Path, job: JobFile) -> None:
    """Writes job.json."""
    spec = {"kind": job.spec.kind, "config": dict(job.spec.config), "resources": asdict(job.spec.resources)}
    write_json(run_directory / JOB_FILE, {"job_id": job.job_id, "database": job.database} | spec)


def read_job_file(run_directory: Path) -> JobFile:
    """Reads job.json. OSError or ValueError if it is not there or is none."""
    return parse_job_file(json.loads((run_directory / JOB_FILE).read_text(encoding="utf-8")))


def parse_job_file(values: Mapping[str, Any]) -> JobFile:
    """What job.json says. ValueError if it says something else."""
    try:
        return _parse(values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{JOB_FILE} is none: {error!r}") from error


def _parse(values: Mapping[str, Any]) -> JobFile:
    spec = JobSpec(kind=JobKind(values["kind"]), config=values["config"], resources=JobResources(**values["resources"]))
    return JobFile(job_id=values["job_id"], spec=spec, database=values["database"])


@contextmanager
def own(run_directory: Path) -> Iterator[None]:
    """Owns the run folder until the end of the block, or of the process. `FolderInUse` if another process does."""
    # Never deleted: a lock on a file that another process has just unlinked would protect nothing.
    with (run_directory / LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUse(f"another worker uses {run_directory}") from None
        yield


def in_use(run_directory: Path) -> bool:
    """True while a worker owns the run folder."""
    try:
        with own(run_directory):
            return False
    except FolderInUse:
        return True


def log_tail(run_directory: Path, num_lines: int) -> str:
    """The last lines of log.txt; empty if there is none."""
    try:
        with (run_directory / LOG_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-num_lines:])
