"""What Prometheus reads of jobs, from a real database."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from steersman.trainer.jobs.metrics import JobCollector, JobReadings
from steersman.trainer.jobs.model import Job, JobKind, JobProgress, JobSpec, JobState, StepMetrics
from steersman.trainer.jobs.store import JobStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(tmp_path / "jobs.sqlite")
    yield store
    store.close()


def create(store: JobStore, name: str) -> None:
    spec = JobSpec(kind=JobKind.PPO, config={})
    job = Job(id=name, spec=spec, state=JobState.PENDING, run_directory=f"/runs/{name}", create_time=5.0)
    store.create(job, max_active=9)


def registry(store: JobStore) -> CollectorRegistry:
    def read() -> JobReadings:
        return [(job, store.newest_metrics(job.id)) for job in store.active()]

    registry = CollectorRegistry()
    registry.register(JobCollector(read))
    return registry


def test_the_newest_step_of_every_active_job_is_told(store: JobStore) -> None:
    create(store, "one")
    create(store, "two")
    told = registry(store)
    store.append("one", [StepMetrics(step=1, values={"objective/scores": 0.5})])
    store.append("one", [StepMetrics(step=2, values={"objective/scores": 0.75}), JobProgress(step=2, total_steps=9)])

    def value(name: str, job: str, **labels: str) -> float | None:
        return told.get_sample_value(f"steersman_job_{name}", {"job_id": job, "kind": "ppo"} | labels)

    assert value("step", "one") == 2
    assert value("total_steps", "one") == 9
    assert value("metric", "one", metric="objective/scores") == 0.75
    assert value("step", "two") == 0
    assert value("metric", "two", metric="objective/scores") is None


def test_a_job_that_ended_is_told_of_no_more(store: JobStore) -> None:
    create(store, "one")
    store.append("one", [StepMetrics(step=1, values={"objective/scores": 0.5})])
    told = registry(store)
    assert b'job_id="one"' in generate_latest(told)
    store.move("one", JobState.CANCELLED)
    assert b'job_id="one"' not in generate_latest(told)


def test_a_database_that_does_not_answer_hides_no_other_metric(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite")
    told = registry(store)
    store.close()
    assert b"steersman_job" not in generate_latest(told)
