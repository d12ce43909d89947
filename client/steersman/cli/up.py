"""`steersman up`: all services of a file as local processes, in front."""

import itertools
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from rich.console import Console
from rich.text import Text

from steersman.cli import console, up_config
from steersman.cli.supervisor import ServiceProcess, Supervisor, describe_exit
from steersman.wire.errors import SteersmanError

_COLOURS: Final = ("cyan", "magenta", "green", "yellow", "blue", "bright_red")


class LogPrinter:
    """Prints each line behind its service's name, in the service's colour; safe to call from many threads."""

    def __init__(self, names: list[str], output: Console) -> None:
        self._width = max(len(name) for name in names)
        self._colours = dict(zip(names, itertools.cycle(_COLOURS), strict=False))
        self._output = output
        self._lock = threading.Lock()

    def __call__(self, name: str, line: str) -> None:
        """Prints a line."""
        text = Text(f"{name:<{self._width}} | ", style=self._colours[name])
        text.append(line, style="default")
        with self._lock:
            self._output.print(text)


@contextmanager
def stop_on_signals(supervisor: Supervisor) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal end waiting; the second one changes nothing, the grace is bounded."""

    def stop(number: int, frame: FrameType | None) -> None:
        supervisor.request_stop()

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run(path: Path, *, quiet: bool = False) -> None:
    """Runs the services until a signal comes. CommandError if one of them ends by itself; StartError if one fails."""
    try:
        config = up_config.load(path)
    except SteersmanError as error:
        raise console.InputError(console.explain(error)) from None
    up_config.forget_inherited_settings()
    notes = console.err()
    with tempfile.TemporaryDirectory(prefix="steersman-up-") as folder:
        specs = config.specs(Path(folder))
        supervisor = Supervisor(
            specs,
            on_line=None if quiet else LogPrinter([spec.name for spec in specs], console.out()),
            start_timeout=config.start_timeout_seconds,
            grace_seconds=config.grace_seconds,
        )
        begin = time.monotonic()

        def ready(name: str) -> None:
            address = supervisor[name].spec.address
            notes.print(f"[bold]{name}[/] is ready on {address} after {time.monotonic() - begin:.1f} s")

        with stop_on_signals(supervisor):
            failed: ServiceProcess | None = None
            try:
                supervisor.start(on_ready=ready)
                failed = supervisor.wait()
            finally:
                notes.print("stopping")
                supervisor.stop()
    if failed is not None:
        code = failed.exit_code
        assert code is not None
        lines = "".join(f"\n    {line}" for line in failed.tail())
        raise console.CommandError(f"{failed.spec.name} {describe_exit(code)}; its last lines:{lines}")
