"""The worker's side of the event stream."""

import logging
import math
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

from steersman.cluster import lines
from steersman.trainer.jobs.model import JobProgress, StepMetrics
from steersman.trainer.jobs.store import JobStore

logger = logging.getLogger(__name__)

# People cannot read faster; a stage may report progress for every micro-batch.
PROGRESS_INTERVAL_SECONDS: Final = 0.2

# Steps that wait for a stuck disk; beyond it training waits too.
MAX_WAITING: Final = 10_000


class EventWriter:
    """A `RunListener` that appends to the store from a thread of its own, so that training never waits for a disk.

    With `echo` each is told as a line too (see `steersman.cluster.lines`), for those who see nothing but a log.

    Events are written in the order in which they came. Every step's metrics are kept; of progress, only the newest is
    kept between two writes.
    """

    def __init__(self, store: JobStore, job_id: str, *, echo: Callable[[str], object] | None = None) -> None:
        self._store = store
        self._job_id = job_id
        self._echo = echo
        self._waiting: deque[JobProgress | StepMetrics] = deque()
        self._last = JobProgress()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write_all, name="job-events", daemon=True)
        self._thread.start()

    @property
    def last_progress(self) -> JobProgress:
        """What the stage said last."""
        return self._last

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step was finished."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < MAX_WAITING)
            self._waiting.append(StepMetrics(step=step, values={name: float(value) for name, value in metrics.items()}))
            self._changed.notify_all()

    def on_progress(self, step: int, total_steps: int, message: str) -> None:
        """The stage went on."""
        with self._changed:
            self._last = JobProgress(step=step, total_steps=total_steps, message=message)
            if self._waiting and isinstance(self._waiting[-1], JobProgress):
                self._waiting.pop()
            self._waiting.append(self._last)
            self._changed.notify_all()

    def close(self, timeout_seconds: float = 60.0) -> None:
        """Writes what is left."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_seconds)

    def _write_all(self) -> None:
        last_progress = -math.inf
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                due = last_progress + PROGRESS_INTERVAL_SECONDS - time.monotonic()
                if due > 0:
                    self._changed.wait_for(lambda: self._closing or not self._only_progress_waits(), timeout=due)
                taken = list(self._waiting)
                closing = self._closing
            if not taken:
                return
            newest = next((event for event in reversed(taken) if isinstance(event, JobProgress)), None)
            events = [event for event in taken if event is newest or isinstance(event, StepMetrics)]
            if not self._append(events) and closing:
                return
            last_progress = time.monotonic()
            with self._changed:
                for event in taken:
                    # The last one may have given way to newer progress meanwhile.
                    if self._waiting and self._waiting[0] is event:
                        self._waiting.popleft()
                self._changed.notify_all()

    def _only_progress_waits(self) -> bool:
        return len(self._waiting) == 1 and isinstance(self._waiting[0], JobProgress)

    def _append(self, events: list[JobProgress | StepMetrics]) -> bool:
        try:
            self._store.append(self._job_id, events)
        except sqlite3.OperationalError:
            # A full or stuck disk must not end a training that itself can go on; metrics.jsonl is written anyway.
            logger.warning("cannot record events, trying again", exc_info=True)
            time.sleep(1.0)
            return False
        if self._echo is not None:
            for event in events:
                self._echo(lines.write(_told(event)))
        return True


def _told(event: JobProgress | StepMetrics) -> lines.Told:
    if isinstance(event, StepMetrics):
        return lines.Told(step=event.step, metrics=event.values)
    return lines.Told(step=event.step, total_steps=event.total_steps, message=event.message)
