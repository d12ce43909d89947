"""The run folder of a job, and what a stage may say while it works.

    metrics.jsonl    one row a step: {"step": 3, "time": 1700000000.0, "objective/kl": 0.12, ...}
    samples.jsonl    what the model said during training
    tensorboard/     the same metrics as event files, one event a step
    checkpoints/     written by `steersman.trainer.checkpoint`
    model/           the final model, Hugging Face layout

Invariants:

- A step has at most one row. A stage that resumes from a checkpoint first calls `rewind` with the checkpoint's step,
  which drops the rows of later steps, and then does those steps again.
- Rows outlive the process at once, and the machine from `sync` on, which a stage calls before each checkpoint. What a
  crash of the machine takes is done again; so no step waits for a disk.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter

from steersman.trainer.distributed.world import SOLO, World

METRICS_FILE: Final = "metrics.jsonl"
SAMPLES_FILE: Final = "samples.jsonl"


class RunListener(Protocol):
    """Hears of every step; the job process forwards it to whoever watches."""

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step was finished."""

    def on_progress(self, step: int, total_steps: int, message: str) -> None:
        """The stage went on, or waits for something that `message` names."""


class Run:
    """Where a stage writes, how it learns that it should stop, and with whom it trains. Not thread-safe: one owner.

    On several ranks each has one; only the lead's writes and tells.
    """

    def __init__(
        self,
        directory: Path,
        *,
        run_id: str,
        listener: RunListener | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
        world: World = SOLO,
    ) -> None:
        self.directory = directory
        self.run_id = run_id
        self.world = world
        self._listener = listener
        self._stop_requested = stop_requested
        self._unsynced: set[str] = set()
        directory.mkdir(parents=True, exist_ok=True)
        self._tensorboard = self._event_files()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the numbers of a finished step under the field's names."""
        if not self.world.is_lead:
            return
        row = {"step": step, "time": time.time()} | {name: float(value) for name, value in metrics.items()}
        self._append(METRICS_FILE, [row])
        if self._tensorboard is not None:
            # One event for all: each is handed to the writer's thread and costs a turn of the interpreter.
            values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
            self._tensorboard.add_summary(Summary(value=values), step)  # type: ignore[no-untyped-call]
            self._tensorboard.flush()  # type: ignore[no-untyped-call]
        if self._listener is not None:
            self._listener.on_metrics(step, metrics)

    def progress(self, step: int, total_steps: int, message: str) -> None:
        """Says how far the stage is, and what it does or waits for."""
        self.world.note(f"step {step} of {total_steps}: {message}")
        if self._listener is not None:
            self._listener.on_progress(step, total_steps, message)

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Records samples; each row should carry its `step`."""
        if self.world.is_lead:
            self._append(SAMPLES_FILE, rows)

    def sync(self) -> None:
        """Returns once all rows are on the disk."""
        for name in sorted(self._unsynced):
            with (self.directory / name).open("rb") as file:
                os.fsync(file.fileno())
        self._unsynced.clear()

    def stop_requested(self) -> bool:
        """True once the job was cancelled: write a checkpoint and return."""
        return self._stop_requested()

    def rewind(self, step: int) -> None:
        """Drops recorded rows of steps after `step`, and a last row that was cut off in writing."""
        if not self.world.is_lead:
            return
        for name in (METRICS_FILE, SAMPLES_FILE):
            path = self.directory / name
            if path.exists():
                kept = [row for row in read_rows(path) if int(row.get("step", 0)) <= step]
                partial = path.with_suffix(".partial")
                partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
                partial.replace(path)
        self.close()
        self._tensorboard = self._event_files(purge_step=step + 1)

    def close(self) -> None:
        """Brings rows and event files to the disk."""
        self.sync()
        if self._tensorboard is not None:
            self._tensorboard.close()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _event_files(self, *, purge_step: int | None = None) -> FileWriter | None:
        if not self.world.is_lead:
            return None
        writer = FileWriter(str(self.directory / "tensorboard"))  # type: ignore[no-untyped-call]
        if purge_step is not None:
            # Says to readers that what earlier files hold of this step and later ones was dropped.
            start = Event(step=purge_step, session_log=SessionLog(status=SessionLog.START))
            writer.add_event(start)  # type: ignore[no-untyped-call]
        return writer

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        with (self.directory / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._unsynced.add(name)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file that `Run` wrote; a last line that was cut off in writing is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
