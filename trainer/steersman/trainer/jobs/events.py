"""The worker's side of the event stream."""

import logging
import math
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Final

from steersman.trainer.jobs.model import JobProgress, StepMetrics
from steersman.trainer.jobs.store import JobStore

logger = logging.getLogger(__name__)

# People cannot read faster; a stage may report progress for every micro-batch.
PROGRESS_INTERVAL_SECONDS: Final = 0.2

# Steps that wait for a stuck disk; beyond it training waits too.
MAX_WAITING: Final = 10_000


class EventWriter:
    """A `RunListener` that appends to the store from a thread of its own, so that training never waits for a disk.

    Every step's metrics are kept, in order. Of progress, only the newest is kept between two writes.
    """

    def __init__(self, store: JobStore, job_id: str) -> None:
        self._store = store
        self._job_id = job_id
        self._metrics: deque[StepMetrics] = deque()
        self._progress: JobProgress | None = None
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
            self._changed.wait_for(lambda: len(self._metrics) < MAX_WAITING)
            self._metrics.append(StepMetrics(step=step, values={name: float(value) for name, value in metrics.items()}))
            self._changed.notify_all()

    def on_progress(self, step: int, total_steps: int, message: str) -> None:
        """The stage went on."""
        with self._changed:
            self._last = self._progress = JobProgress(step=step, total_steps=total_steps, message=message)
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
                self._changed.wait_for(lambda: self._metrics or self._progress or self._closing)
                due = last_progress + PROGRESS_INTERVAL_SECONDS - time.monotonic()
                if not self._metrics and not self._closing and due > 0:
                    self._changed.wait_for(lambda: self._metrics or self._closing, timeout=due)
                events: list[JobProgress | StepMetrics] = list(self._metrics)
                if self._progress is not None:
                    events.append(self._progress)
                if not events:
                    return
                closing = self._closing
            if not self._append(events) and closing:
                return
            last_progress = time.monotonic()
            with self._changed:
                for event in events:
                    if isinstance(event, StepMetrics):
                        self._metrics.popleft()
                    elif self._progress is event:
                        self._progress = None
                self._changed.notify_all()

    def _append(self, events: list[JobProgress | StepMetrics]) -> bool:
        try:
            self._store.append(self._job_id, events)
        except sqlite3.OperationalError:
            # A full or stuck disk must not end a training that itself can go on; metrics.jsonl is written anyway.
            logger.warning("cannot record events, trying again", exc_info=True)
            time.sleep(1.0)
            return False
        return True
