"""Starts services as local processes, waits for their health, passes on what they log, and ends them.

    >>> policy = ServiceSpec.of("policy", ["--model", "runs/sft/model", "--port", "50051"], address="127.0.0.1:50051")
    >>> with Supervisor([policy], on_line=print_line) as supervisor:    # started; healthy, or StartError
    ...     failed = supervisor.wait()                                  # until one ends by itself, or `request_stop`

Invariants: leaving the `with` block leaves no process behind, whatever happened inside; and no process outlives this
one, even if it is killed (Linux). All methods block and may be called from any thread.
"""

import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from steersman.cli import tether
from steersman.client.channel import ChannelSettings
from steersman.client.health import HealthClient, ServingStatus
from steersman.wire.errors import SteersmanError

LineListener = Callable[[str, str], None]

_TAIL_LINES: Final = 200
_MAX_LINE_BYTES: Final = 64 * 1024
_POLL_SECONDS: Final = 0.1
# A service that has just begun to listen should be noticed at once.
_HEALTH_SETTINGS: Final = ChannelSettings(max_reconnect_seconds=0.25)
# Processes that share cores must sleep while they wait for work: OpenMP threads that spin take the others' time.
_SHARED_CORES: Final = {"OMP_WAIT_POLICY": "PASSIVE"}

# The death signal follows the *thread* that started a process. This one lives as long as the interpreter.
_spawner: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="steersman-spawner")


class StartError(Exception):
    """A service did not come up. The message says which, why, and its last lines."""

    def __init__(self, name: str, reason: str, tail: Sequence[str] = ()) -> None:
        lines = "".join(f"\n    {line}" for line in tail)
        super().__init__(f"{name}: {reason}{lines}")
        self.name = name
        self.reason = reason
        self.tail = tuple(tail)


@dataclass(frozen=True, kw_only=True)
class ServiceSpec:
    """A service to run.

    Attributes:
        name: how logs and errors call it.
        command: program and arguments.
        address: `host:port` where its health is asked for.
        environment: variables on top of this process's.
        directory: to run in; None: this process's.
    """

    name: str
    command: tuple[str, ...]
    address: str
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path | None = None

    @classmethod
    def of(
        cls,
        service: str,
        arguments: Sequence[str],
        *,
        address: str,
        name: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """A service of this distribution: `python -m steersman.SERVICE ARGUMENTS...`."""
        command = (sys.executable, "-m", f"steersman.{service}", *arguments)
        return cls(name=name or service, command=command, address=address, environment=environment or {})


def free_port(host: str = "127.0.0.1") -> int:
    """A port that no other program is given as long as this process lives.

    It stays bound, without listening: the kernel then gives it neither to outgoing connections nor to those who ask for
    any free port. A server that is told the number can listen on it, since it binds with SO_REUSEADDR as servers do.
    """
    holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((host, 0))
    port: int = holder.getsockname()[1]
    holder.detach()  # held until the process ends
    return port


def port_in_use(host: str, port: int) -> bool:
    """True if the port cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def describe_exit(code: int) -> str:
    """ "exited with status 1" or "was ended by SIGKILL"."""
    if code >= 0:
        return f"exited with status {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


class ServiceProcess:
    """One service as a process group of its own, so that Ctrl-C in the terminal reaches the supervisor alone."""

    def __init__(self, spec: ServiceSpec, on_line: LineListener | None = None) -> None:
        self.spec = spec
        self._on_line = on_line
        self._lines: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._asked_to_end = False

    @property
    def pid(self) -> int:
        """Process id; the service itself, not a wrapper."""
        assert self._process is not None, f"{self.spec.name} was not started"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit status, negative for a signal; None while it runs or before its start."""
        return self._process.poll() if self._process is not None else None

    @property
    def is_running(self) -> bool:
        """True between start and end of the process."""
        return self._process is not None and self._process.poll() is None

    def tail(self, num_lines: int = 20) -> list[str]:
        """The last lines that it wrote, of stdout and stderr together."""
        return list(self._lines)[-num_lines:]

    def start(self) -> None:
        """Starts the process, again if it has ended. Raises StartError if its port is taken or the program missing."""
        if self.is_running:
            return
        host, _, port = self.spec.address.rpartition(":")
        if port_in_use(host.strip("[]"), int(port)):
            raise StartError(self.spec.name, f"port {port} on {host} is in use by another program")
        self._lines.clear()
        self._asked_to_end = False
        command = [sys.executable, tether.__file__, str(os.getpid()), *self.spec.command]
        environment = _SHARED_CORES | os.environ | {"PYTHONUNBUFFERED": "1"} | dict(self.spec.environment)
        try:
            self._process = _spawner.submit(
                subprocess.Popen,
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.spec.directory,
                process_group=0,
            ).result()
        except OSError as error:
            raise StartError(self.spec.name, f"cannot start {self.spec.command[0]}: {error.strerror}") from error
        assert self._process.stdout is not None
        name = f"steersman-log-{self.spec.name}"
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), name=name, daemon=True)
        self._reader.start()

    def is_serving(self) -> bool:
        """True if it runs and its health says SERVING."""
        if not self.is_running:
            return False
        with self._health() as health:
            return _serves(health)

    def wait_ready(self, timeout: float, stop: threading.Event | None = None) -> None:
        """Returns once its health says SERVING, or once `stop` is set. Raises StartError if it dies or takes longer."""
        end = time.monotonic() + timeout
        stop = stop or threading.Event()
        with self._health() as health:
            while not stop.wait(_POLL_SECONDS):
                if not self.is_running:
                    self._join_reader()
                    code = self.exit_code
                    reason = "is not started" if code is None else f"{describe_exit(code)} before it was ready"
                    raise StartError(self.spec.name, reason, self.tail())
                if _serves(health):
                    return
                if time.monotonic() >= end:
                    raise StartError(self.spec.name, f"is not ready after {timeout:g} s", self.tail())

    def terminate(self) -> None:
        """Asks it to drain and end (SIGTERM), once: a second signal would cut short an orderly end."""
        if self.is_running and not self._asked_to_end:
            assert self._process is not None
            self._asked_to_end = True
            self._process.terminate()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status. Raises TimeoutError if it runs on for longer than `timeout` seconds."""
        assert self._process is not None, f"{self.spec.name} was not started"
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.spec.name} still runs after {timeout:g} s") from None
        self._join_reader()
        return code

    def kill(self) -> None:
        """Ends it and what it started in its group, at once (SIGKILL), and waits for the end."""
        if self._process is None:
            return
        # A group outlives its leader as long as it has members: helpers that the service left behind.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._join_reader()

    def stop(self, grace_seconds: float = 30.0) -> int | None:
        """SIGTERM, then SIGKILL after `grace_seconds`. Returns the exit status; None if it was never started."""
        if self._process is None:
            return None
        self.terminate()
        with contextlib.suppress(TimeoutError):
            self.wait(grace_seconds)
        self.kill()
        return self._process.returncode

    def _health(self) -> HealthClient:
        return HealthClient(self.spec.address, settings=_HEALTH_SETTINGS)

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            while line := stream.readline(_MAX_LINE_BYTES):
                text = line.decode(errors="replace").rstrip("\r\n")
                self._lines.append(text)
                if self._on_line is not None:
                    self._on_line(self.spec.name, text)

    def _join_reader(self) -> None:
        # Helpers that hold the pipe open must not hold us.
        if self._reader is not None:
            self._reader.join(timeout=2.0)


def _serves(health: HealthClient) -> bool:
    try:
        return health.check(timeout=2.0) is ServingStatus.SERVING
    except SteersmanError:
        return False


class Supervisor:
    """Several services as one: all up, or none.

    Args:
        specs: what to run, in the order of their start; names must differ.
        on_line: hears each line that a service writes, with the service's name, from a thread of that service.
        start_timeout: seconds until all must be healthy. A large model takes minutes to load.
        grace_seconds: between SIGTERM and SIGKILL.
    """

    def __init__(
        self,
        specs: Sequence[ServiceSpec],
        *,
        on_line: LineListener | None = None,
        start_timeout: float = 300.0,
        grace_seconds: float = 30.0,
    ) -> None:
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            raise ValueError(f"names are {names}, allowed: different ones")
        self.processes: dict[str, ServiceProcess] = {spec.name: ServiceProcess(spec, on_line) for spec in specs}
        self._start_timeout = start_timeout
        self._grace_seconds = grace_seconds
        self._stop_requested = threading.Event()

    def __getitem__(self, name: str) -> ServiceProcess:
        return self.processes[name]

    def start(self, on_ready: Callable[[str], None] | None = None) -> None:
        """Starts all side by side and returns once all serve, or once `request_stop` was called.

        `on_ready` hears the name of each that became ready. If one fails, the others are ended and StartError says
        which it was.
        """
        end = time.monotonic() + self._start_timeout
        try:
            for process in self.processes.values():
                process.start()
            waiting = dict(self.processes)
            with contextlib.ExitStack() as stack:
                clients = {name: stack.enter_context(process._health()) for name, process in waiting.items()}
                while waiting and not self._stop_requested.wait(_POLL_SECONDS):
                    for name, process in list(waiting.items()):
                        if not process.is_running or time.monotonic() >= end:
                            process.wait_ready(0.0)  # raises, and says why
                        if _serves(clients[name]):
                            del waiting[name]
                            if on_ready is not None:
                                on_ready(name)
        except BaseException:
            self.stop()
            raise

    def wait(self) -> ServiceProcess | None:
        """Blocks until a service ends by itself, and returns it; None after `request_stop`."""
        while not self._stop_requested.wait(_POLL_SECONDS):
            for process in self.processes.values():
                if not process.is_running:
                    process.wait(timeout=5.0)
                    return process
        return None

    def request_stop(self) -> None:
        """Makes `start` and `wait` return soon. May be called from a signal handler, any number of times."""
        self._stop_requested.set()

    def stop(self) -> None:
        """Ends all, the last started first: each gets SIGTERM at once, and SIGKILL when the grace is over."""
        end = time.monotonic() + self._grace_seconds
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in reversed(self.processes.values()):
            process.stop(max(end - time.monotonic(), 0.1))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
