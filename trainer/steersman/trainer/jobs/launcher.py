"""How a job's worker is started, asked after, and stopped.

`LocalLauncher` starts processes on this machine, each in a session of its own: a signal to the service, or its end,
does not reach them. A process is known by its id *and* its start time, because ids are used again.
"""

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import psutil

from steersman.trainer.jobs.folder import LOG_FILE, log_tail
from steersman.trainer.jobs.model import JobResources, JobSpec
from steersman.wire.errors import FieldViolation, invalid_field
from steersman.wire.limits import MIB

# sysexits.h EX_TEMPFAIL: the worker found another worker in its run folder.
EXIT_FOLDER_IN_USE: Final = 75
REAP_SECONDS: Final = 10.0
# Of one answer: far below what a message holds.
MAX_LOG_BYTES: Final = MIB
# In the environment of ranks: the process that the launcher started, and knows them by.
ENV_PROCESS: Final = "STEERSMAN_WORKER_PROCESS"
_NODE: Final = (sys.executable, "-P", "-m", "steersman.trainer.jobs.node")
_LOOPBACK: Final = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    """Whether a worker lives, and how it ended as far as that is known.

    `waiting` says why a worker that lives does not run yet: no node, no image, no quota.
    """

    alive: bool
    ending: str = ""
    waiting: str = ""


@dataclass(frozen=True, kw_only=True)
class LogPart:
    """Which lines of a log.

    Attributes:
        cursor: of the lines before; empty for the beginning.
        tail_lines: only so many of the last, without a cursor; 0 for all.
        node: of a job on several.
    """

    cursor: str = ""
    tail_lines: int = 0
    node: int = 0


@dataclass(frozen=True, kw_only=True)
class LogLines:
    """Lines of a log, and the cursor that the next ones follow; `more` if some are there already."""

    lines: Sequence[str]
    cursor: str
    more: bool = False


class LaunchRefused(OSError):
    """A worker cannot be started, and trying again will not help; `strerror` says why and what to do."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.ENOEXEC, why)


class Launcher(Protocol):
    """Starts workers somewhere. Handles are strings that outlive the service; launching twice starts two workers."""

    def check(self, resources: JobResources) -> Sequence[FieldViolation]:
        """What this launcher cannot give; empty if it can give everything asked for."""

    async def describe(self, run_directory: Path, spec: JobSpec) -> str:
        """What `launch` would make, as YAML for people and for kubectl; empty if that is a process only."""

    async def launch(self, run_directory: Path, resources: JobResources) -> str:
        """Starts a worker for a run folder; returns its handle. OSError if it cannot start; ENGINE_UNAVAILABLE if it
        cannot now, but may later."""

    async def status(self, handle: str) -> WorkerStatus:
        """Whether the worker lives."""

    async def stop(self, handle: str) -> None:
        """Asks the worker to write a checkpoint and end. Nothing happens if it has ended."""

    async def kill(self, handle: str) -> None:
        """Ends the worker and its children at once. Nothing happens if it has ended."""

    async def read_log(self, handle: str, run_directory: Path, part: LogPart) -> LogLines:
        """Lines that a worker has printed. ENGINE_UNAVAILABLE if they cannot be read now."""


class LocalLauncher:
    """Workers as processes of this machine, those of one job under torchrun if they are several."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-P", "-m", "steersman.trainer.jobs.worker")) -> None:
        self._command = tuple(command)
        # Those that this service started: it alone can learn how they ended.
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def check(self, resources: JobResources) -> Sequence[FieldViolation]:
        """The processes of a local job see all of the machine, and each takes the GPU of its number; only their CPU
        threads can be bounded.
        """
        num_cpus = os.cpu_count() or 1
        num_each = num_cpus // max(1, resources.num_processes)
        bounds = {
            "num_processes": (
                resources.num_processes,
                f"0 to the {num_cpus} CPUs of this machine",
                0 <= resources.num_processes <= num_cpus,
            ),
            "processes_per_node": (
                resources.processes_per_node,
                "0 or num_processes",
                resources.processes_per_node in (0, max(1, resources.num_processes)),
            ),
            "gpus_per_process": (resources.gpus_per_process, "0 or 1", resources.gpus_per_process in (0, 1)),
            "cpus_per_process": (
                resources.cpus_per_process,
                f"0 to the {num_each} for each process of this machine",
                0 <= resources.cpus_per_process <= num_each,
            ),
            "memory_bytes_per_process": (
                resources.memory_bytes_per_process,
                "0",
                resources.memory_bytes_per_process == 0,
            ),
            "queue_name": (resources.queue_name, "empty", not resources.queue_name),
            "image": (resources.image, "empty", not resources.image),
        }
        return [
            FieldViolation(
                field=f"spec.resources.{name}", description=f"is {value!r}, allowed for local jobs: {allowed}"
            )
            for name, (value, allowed, fine) in bounds.items()
            if not fine
        ]

    async def describe(self, run_directory: Path, spec: JobSpec) -> str:
        """See `Launcher`."""
        return ""

    async def launch(self, run_directory: Path, resources: JobResources) -> str:
        """See `Launcher`. What the worker prints goes to log.txt of the run folder."""
        return await asyncio.to_thread(self._launch, run_directory, resources)

    def _launch(self, run_directory: Path, resources: JobResources) -> str:
        with (run_directory / LOG_FILE).open("ab") as log:
            child = subprocess.Popen(
                [*self._command_for(resources.num_processes), str(run_directory)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=_environment(resources),
            )
        # Reaps it whenever it ends, so that no zombie waits for the next question.
        threading.Thread(target=child.wait, name=f"reap-{child.pid}", daemon=True).start()
        self._children[child.pid] = child
        return process_handle(child.pid)

    def _command_for(self, num_processes: int) -> Sequence[str]:
        if num_processes <= 1:
            return self._command
        # torchrun listens at the port after the one of the meeting, which a single node does not hold.
        place = ("--nodes", "1", "--coordinator", _LOOPBACK, "--port", str(_free_port() - 1))
        return (*_NODE, *place, "--processes", str(num_processes))

    async def status(self, handle: str) -> WorkerStatus:
        """See `Launcher`. How a worker ended is known only to the service that started it."""
        if not handle.startswith("{"):
            return WorkerStatus(alive=False, ending="was started by another kind of launcher")
        if _find(handle) is not None:
            return WorkerStatus(alive=True)
        child = self._children.get(json.loads(handle)["pid"])
        if child is None:
            return WorkerStatus(alive=False, ending="ended while no service watched it")
        # It has ended, so this waits for the reaper at most.
        code = await asyncio.to_thread(child.wait, REAP_SECONDS)
        return WorkerStatus(alive=False, ending=_describe_exit(code))

    async def stop(self, handle: str) -> None:
        """See `Launcher`. SIGTERM goes to the worker alone: its children are its own business."""
        if (pid := _find(handle)) is not None:
            _send(os.kill, pid, signal.SIGTERM)

    async def kill(self, handle: str) -> None:
        """See `Launcher`. Ranks are in sessions of their own, and would go on without what started them."""
        if (pid := _find(handle)) is not None:
            with suppress(psutil.NoSuchProcess):
                ranks = psutil.Process(pid).children(recursive=True)
                _send(os.killpg, pid, signal.SIGKILL)
                for rank in ranks:
                    with suppress(psutil.NoSuchProcess):
                        rank.kill()

    async def read_log(self, handle: str, run_directory: Path, part: LogPart) -> LogLines:
        """See `Launcher`: lines of log.txt; the cursor is a place in bytes."""
        if part.cursor and not (part.cursor.isascii() and part.cursor.isdigit() and len(part.cursor) < 19):
            raise invalid_field("page_token", part.cursor, "the next_page_token of the answer before")
        return await asyncio.to_thread(_read_log, run_directory / LOG_FILE, int(part.cursor or 0), part.tail_lines)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_LOOPBACK, 0))
        return int(listener.getsockname()[1])


def _read_log(path: Path, place: int, tail_lines: int) -> LogLines:
    """Whole lines from a place on, a bounded piece of them."""
    if tail_lines and not place:
        lines = log_tail(path.parent, tail_lines).splitlines()
        size = path.stat().st_size if path.exists() else 0
        return LogLines(lines=lines, cursor=str(size))
    try:
        with path.open("rb") as file:
            file.seek(place)
            data = file.read(MAX_LOG_BYTES)
            more = len(data) == MAX_LOG_BYTES
    except FileNotFoundError:
        return LogLines(lines=(), cursor=str(place))
    # A line under way waits for its end, unless nothing else fits.
    whole = data if more and b"\n" not in data else data[: data.rfind(b"\n") + 1]
    return LogLines(lines=whole.decode(errors="replace").splitlines(), cursor=str(place + len(whole)), more=more)


def process_handle(pid: int) -> str:
    """The handle of a local process: its id and what tells it from a later process of the same id."""
    return json.dumps({"pid": pid, "start": _start_mark(pid)})


def _start_mark(pid: int) -> str:
    """Start time of a process: clock ticks since which boot. Empty if there is no such process, or only a zombie."""
    try:
        # Linux; wall-clock start times shift whenever the clock is set.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return "" if fields[0] == "Z" else f"{boot}:{fields[19]}"
    except FileNotFoundError:
        if sys.platform == "linux":
            return ""
    try:
        return f"{psutil.Process(pid).create_time():.2f}"
    except psutil.NoSuchProcess:
        return ""


def _find(handle: str) -> int | None:
    """The id of the process behind a handle, None once it has ended."""
    values = json.loads(handle)
    mark = _start_mark(values["pid"])
    return values["pid"] if mark and mark == values["start"] else None


def _send(send: "_Send", pid: int, number: signal.Signals) -> None:
    try:
        send(pid, number)
    except ProcessLookupError:
        return


class _Send(Protocol):
    def __call__(self, pid: int, number: int, /) -> None: ...


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exited with status {code}"
    name = signal.Signals(-code).name
    hint = " (the kernel does that when memory runs out)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def _environment(resources: JobResources) -> Mapping[str, str]:
    environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
    # Services share the cores; threads that wait by spinning would slow all of them down, many times over.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Bars drawn over each other make a log unreadable.
    environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if resources.num_processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // resources.num_processes)))
        if sys.platform == "linux":  # they talk to each other alone
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
            environment.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if resources.cpus_per_process > 0:
        environment["OMP_NUM_THREADS"] = str(max(1, int(resources.cpus_per_process)))
    return environment
