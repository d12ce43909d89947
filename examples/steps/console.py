"""What a person sees while a pipeline runs, and where its time went."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Console:
    """Lines with the time since the start; phases with their seconds."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.phase_seconds: dict[str, float] = {}
        self._phase = ""

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def say(self, text: str) -> None:
        """One line."""
        sys.stdout.write(f"[{self.seconds:6.1f} s] {self._phase:<12} {text}\n")
        sys.stdout.flush()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Lines inside carry the name; the seconds go to `phase_seconds`."""
        before, self._phase = self._phase, name
        started = time.monotonic()
        try:
            yield
        finally:
            self.phase_seconds[name] = round(time.monotonic() - started, 2)
            self._phase = before
