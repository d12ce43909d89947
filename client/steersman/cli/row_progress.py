"""How far a long list is: a bar on a terminal, elsewhere a plain line now and then; on stderr either way."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from steersman.cli import console

_LINE_SECONDS: Final = 10.0


class RowProgress:
    """Counts rows. `done` and `failed` may begin above 0, where an earlier run stopped; the rate counts this one."""

    def __init__(
        self,
        what: str,
        total: int | None,
        *,
        done: int = 0,
        failed: int = 0,
        output: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.done = done
        self.failed = failed
        self._total = total
        self._first = done
        self._clock = clock
        self._begin = self._last_line = clock()
        self._console = output or console.err()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total, completed=done, rate="")

    def advance(self, rows: int, failed: int) -> None:
        """So many more rows are done, of which some have failed."""
        self.done += rows
        self.failed += failed
        self._bar.update(self._task, completed=self.done, rate=self._rate_text())
        if not self._console.is_terminal and self._clock() - self._last_line >= _LINE_SECONDS:
            self._last_line = self._clock()
            self.note(self.line())

    def line(self) -> str:
        """All of it in words."""
        parts = [f"{self.done}/{self._total} rows" if self._total is not None else f"{self.done} rows"]
        parts.append(self._rate_text())
        rate = self._rate()
        if self._total is not None and rate > 0:
            parts.append(f"{(self._total - self.done) / rate:.0f} s left")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return ", ".join(parts)

    def note(self, message: str) -> None:
        """Says something beside the bar."""
        self._console.print(Text(message))

    def _rate(self) -> float:
        return (self.done - self._first) / max(self._clock() - self._begin, 1e-9)

    def _rate_text(self) -> str:
        return f"{self._rate():.1f} rows/s"

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
