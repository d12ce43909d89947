"""The worker's event writer: all metrics, the newest progress, nothing lost at the end."""

import threading
from pathlib import Path
from typing import cast

from steersman.trainer.jobs.events import EventWriter
from steersman.trainer.jobs.model import Job, JobKind, JobProgress, JobSpec, JobState, StepMetrics
from steersman.trainer.jobs.store import JobStore


def test_every_step_and_the_last_progress_arrive(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite")
    spec = JobSpec(kind=JobKind.PPO, config={})
    store.create(Job(id="j", spec=spec, state=JobState.PENDING, run_directory="r", create_time=0.0), max_active=1)
    writer = EventWriter(store, "j")
    for step in range(200):
        writer.on_progress(step, 200, f"step {step}")
        writer.on_metrics(step, {"loss": step / 2})
    writer.on_progress(200, 200, "done")
    writer.close()
    events = [event.payload for event in store.events("j", after=1, limit=1000)]
    metrics = [event for event in events if isinstance(event, StepMetrics)]
    assert metrics == [StepMetrics(step=step, values={"loss": step / 2}) for step in range(200)]
    progress = [event for event in events if isinstance(event, JobProgress)]
    assert progress[-1] == writer.last_progress == JobProgress(step=200, total_steps=200, message="done")
    assert len(progress) < 200
    store.close()


class SlowStore:
    """Holds its first write up until it is told to go on."""

    def __init__(self) -> None:
        self.events: list[JobProgress | StepMetrics] = []
        self.called = threading.Event()
        self.go_on = threading.Event()

    def append(self, job_id: str, events: list[JobProgress | StepMetrics]) -> None:
        self.called.set()
        assert self.go_on.wait(30)
        self.events += events


def test_progress_and_metrics_keep_their_order() -> None:
    store = SlowStore()
    writer = EventWriter(cast(JobStore, store), "j")
    writer.on_metrics(1, {})
    assert store.called.wait(30)
    writer.on_progress(1, 2, "training")
    writer.on_progress(1, 2, "updating")
    writer.on_metrics(2, {})
    store.go_on.set()
    writer.close()
    assert store.events == [
        StepMetrics(step=1, values={}),
        JobProgress(step=1, total_steps=2, message="updating"),
        StepMetrics(step=2, values={}),
    ]
