"""How a job looks while somebody watches: a bar, its key numbers, and what it does or waits for."""

from collections.abc import Iterable, Mapping
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from steersman.client.types import Job, JobEvent, JobProgress, JobState, StateChange, StepMetrics

# What a person looks at first, in this order, as far as the job reports it.
_KEY_METRICS: Final = (
    "objective/rlhf_reward",
    "objective/scores",
    "objective/kl",
    "objective/entropy",
    "policy/loss",
    "policy/clipfrac",
    "value/loss",
    "val/explained_variance",
    "loss",
    "train/loss",
    "eval/loss",
    "accuracy",
    "eval/accuracy",
    "learning_rate",
)
_MAX_SHOWN: Final = 8
_STATE_STYLE: Final = {JobState.SUCCEEDED: "green", JobState.FAILED: "bold red", JobState.CANCELLED: "yellow"}


def key_metrics(values: Mapping[str, float], limit: int = _MAX_SHOWN) -> dict[str, float]:
    """At most `limit` numbers, the most telling first; without any known name, the first by name."""
    known = [name for name in _KEY_METRICS if name in values]
    others = sorted(name for name in values if name not in known and "time" not in name and "second" not in name)
    return {name: values[name] for name in [*known, *others][:limit]}


class JobView:
    """What is known of a job from its events, and how it is shown.

    On a terminal it draws in place; elsewhere it writes one plain line an event that says something new.
    """

    def __init__(self, job: Job, console: Console) -> None:
        self.state = job.state
        self.error = job.error
        self._job_id = job.id
        self._console = console
        self._message = job.progress.message
        self._metrics: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        description = f"{job.id} ({job.kind})"
        self._task: TaskID = self._progress.add_task(
            description, total=job.progress.total_steps or None, completed=job.progress.step
        )

    def show(self, events: Iterable[JobEvent]) -> None:
        """Shows the events until they end."""
        if not self._console.is_terminal:
            last = ""
            for event in events:
                self._take(event)
                if (line := self._line(event)) != last:
                    self._console.print(Text(line))
                last = line
            return
        with Live(self, console=self._console, refresh_per_second=8):
            for event in events:
                self._take(event)

    def note(self, message: str) -> None:
        """Shows a message of the watcher itself, such as a lost connection."""
        self._message = message
        if not self._console.is_terminal:
            self._console.print(Text(message))

    def _take(self, event: JobEvent) -> None:
        match event.event:
            case StateChange(state=state, error=error):
                self.state, self.error = state, error
            case JobProgress(step=step, total_steps=total, message=message):
                self._message = message
                self._progress.update(self._task, completed=step, total=total or None)
            case StepMetrics(step=step, values=values):
                self._metrics = dict(values)
                self._progress.update(self._task, completed=step)

    def _line(self, event: JobEvent) -> str:
        match event.event:
            case StateChange(state=state, error=error):
                return f"{self._job_id}: {state}" + (f": {error}" if error else "")
            case JobProgress(step=0, total_steps=0, message=message):
                return f"{self._job_id}: {message}"  # it does not know yet how far it goes
            case JobProgress(step=step, total_steps=total, message=message):
                return f"step {step}/{total or '?'}: {message}"
            case StepMetrics(step=step, values=values):
                numbers = "  ".join(f"{name}={value:.4g}" for name, value in key_metrics(values).items())
                return f"step {step}: {numbers}"

    def __rich__(self) -> RenderableType:
        numbers = Table.grid(padding=(0, 2))
        shown = list(key_metrics(self._metrics).items())
        for start in range(0, len(shown), 4):
            cells = [Text.assemble((f"{name} ", "dim"), f"{value:.4g}") for name, value in shown[start : start + 4]]
            numbers.add_row(*cells)
        state = Text.assemble((str(self.state), _STATE_STYLE.get(self.state, "cyan")), "  ", self._message)
        return Group(self._progress, numbers, state)


def jobs_table(jobs: Iterable[Job]) -> Table:
    """Jobs, one a row."""
    table = Table(box=None, pad_edge=False)
    for name in ("JOB", "KIND", "STATE", "STEP", "CREATED", "MESSAGE"):
        table.add_column(name, overflow="fold")
    for job in jobs:
        step = f"{job.progress.step}/{job.progress.total_steps}" if job.progress.total_steps else str(job.progress.step)
        created = job.create_time.astimezone().strftime("%Y-%m-%d %H:%M:%S") if job.create_time else ""
        state = f"[{_STATE_STYLE.get(job.state, 'cyan')}]{job.state}[/]"
        table.add_row(
            job.id, job.kind, state, step, created, Text((job.error or job.progress.message).partition("\n")[0])
        )
    return table
