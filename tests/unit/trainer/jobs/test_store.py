"""The store: legal moves only, gapless events from several writers, bounded number of active jobs."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from steersman.trainer.jobs.model import (
    ACTIVE_STATES,
    MOVES,
    Job,
    JobKind,
    JobProgress,
    JobResources,
    JobSpec,
    JobState,
    StateChange,
    StepMetrics,
)
from steersman.trainer.jobs.store import JobStore, dump_spec
from steersman.wire.errors import Reason, SteersmanError

SPEC = JobSpec(
    kind=JobKind.SFT,
    config={"data": {"path": "a.jsonl"}, "rates": [1, 2.5], "name": "ünïcode"},
    resources=JobResources(cpus_per_process=2, labels={"team": "a"}),
)


def make_job(name: str = "one", **changes: object) -> Job:
    values = {"spec": SPEC, "state": JobState.PENDING, "run_directory": f"/runs/{name}", "create_time": 5.0}
    return Job(id=name, **(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(tmp_path / "jobs.sqlite")
    yield store
    store.close()


def test_a_job_comes_back_as_it_was_recorded(store: JobStore) -> None:
    created = store.create(make_job(restarts_left=2), max_active=1)
    assert created == store.get("one") == make_job(restarts_left=2)


def test_workers_keep_the_journal_that_the_service_chose(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    service = JobStore(path, journal="delete")
    service.create(make_job(), max_active=1)
    worker = JobStore(path, journal=None)
    worker.begin("one", "handle")
    version = service.data_version()
    worker.append("one", [JobProgress(step=1)])
    assert service.data_version() != version
    assert not path.with_name("jobs.sqlite-wal").exists()
    worker.close()
    service.close()
    # And back, once nobody uses it: jobs and all.
    local = JobStore(path)
    assert path.with_name("jobs.sqlite-wal").exists()
    assert local.get("one").handle == "handle"
    local.close()


def test_a_journal_is_not_changed_under_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steersman.trainer.jobs.store.BUSY_TIMEOUT_SECONDS", 0.1)
    worker = JobStore(tmp_path / "jobs.sqlite")
    with pytest.raises(SteersmanError, match="end the workers that have it open"):
        JobStore(tmp_path / "jobs.sqlite", journal="delete")
    worker.close()


def test_a_second_job_of_the_same_name_is_refused(store: JobStore) -> None:
    store.create(make_job(), max_active=5)
    with pytest.raises(SteersmanError) as caught:
        store.create(make_job(), max_active=5)
    assert caught.value.reason is Reason.ALREADY_EXISTS


def test_only_jobs_that_have_not_ended_count_against_the_limit(store: JobStore) -> None:
    store.create(make_job("a"), max_active=1)
    with pytest.raises(SteersmanError) as caught:
        store.create(make_job("b"), max_active=1)
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after_seconds
    store.move("a", JobState.FAILED, error="gone")
    store.create(make_job("b"), max_active=1)
    with pytest.raises(SteersmanError) as caught:
        store.restart("a", expected={JobState.FAILED}, restarts_left=0, max_active=1)
    assert caught.value.reason is Reason.QUEUE_FULL
    assert store.get("a").state is JobState.FAILED


@pytest.mark.parametrize("source", list(JobState))
@pytest.mark.parametrize("target", list(JobState))
def test_moves_follow_the_table(store: JobStore, source: JobState, target: JobState) -> None:
    store.create(make_job(), max_active=1)
    for step in _way_to(source):
        store.move("one", step)
    num_events = len(store.events("one", after=0))
    if target in MOVES[source]:
        assert store.move("one", target).state is target
        assert store.events("one", after=num_events)[0].payload == StateChange(state=target)
    else:
        with pytest.raises(SteersmanError) as caught:
            store.move("one", target)
        assert caught.value.reason is Reason.JOB_STATE
        assert store.get("one").state is source
        assert len(store.events("one", after=0)) == num_events


def _way_to(state: JobState) -> list[JobState]:
    match state:
        case JobState.PENDING:
            return []
        case JobState.SUCCEEDED | JobState.CANCELLED:
            return [JobState.RUNNING, state]
    return [state]


def test_events_of_several_writers_have_no_gaps(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    first = JobStore(path)
    first.create(make_job(), max_active=1)

    def write(writer: int) -> None:
        own = JobStore(path)
        for step in range(25):
            own.append("one", [StepMetrics(step=step, values={"writer": writer}), JobProgress(step=step)])
        own.close()

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    events = first.events("one", after=0, limit=1000)
    assert [event.sequence for event in events] == list(range(1, 1 + 4 * 25 * 2 + 1))
    assert [event.sequence for event in first.events("one", after=190, limit=3)] == [191, 192, 193]
    first.close()


def test_progress_shows_in_the_job(store: JobStore) -> None:
    store.create(make_job(), max_active=1)
    progress = JobProgress(step=3, total_steps=9, message="waiting for reward")
    store.append("one", [JobProgress(step=2), progress])
    assert store.get("one").progress == progress


def test_a_worker_records_itself_and_an_ended_job_turns_it_away(store: JobStore) -> None:
    store.create(make_job(), max_active=1)
    running = store.begin("one", "worker-1")
    assert (running.state, running.handle, running.num_attempts) == (JobState.RUNNING, "worker-1", 1)
    store.set_handle("one", "late launcher")
    assert store.get("one").handle == "worker-1"
    store.move("one", JobState.CANCELLING)
    assert store.begin("one", "worker-2").state is JobState.CANCELLING
    store.move("one", JobState.CANCELLED)
    with pytest.raises(SteersmanError) as caught:
        store.begin("one", "worker-3")
    assert caught.value.reason is Reason.JOB_STATE


def test_a_restart_forgets_the_end_of_the_attempt_before(store: JobStore) -> None:
    store.create(make_job(), max_active=1)
    store.begin("one", "worker-1")
    failed = store.move("one", JobState.FAILED, error="out of memory")
    assert failed.error == "out of memory"
    assert failed.end_time is not None
    again = store.restart("one", expected={JobState.FAILED}, restarts_left=1, max_active=1, reason="resumed")
    assert (again.state, again.error, again.end_time, again.handle) == (JobState.PENDING, "", None, "")
    assert (again.restarts_left, again.num_attempts) == (1, 1)


def test_pages_are_newest_first_and_complete(store: JobStore) -> None:
    for number in range(5):
        store.create(make_job(f"job-{number}"), max_active=9)
    store.move("job-2", JobState.FAILED)
    seen, before = [], None
    while True:
        page, before = store.list_page(before=before, limit=2)
        seen += [job.id for job in page]
        if before is None:
            break
    assert seen == ["job-4", "job-3", "job-2", "job-1", "job-0"]
    assert [job.id for job in store.list_page(states=[JobState.FAILED])[0]] == ["job-2"]
    assert {job.id for job in store.active()} == {"job-0", "job-1", "job-3", "job-4"}
    assert all(job.state in ACTIVE_STATES for job in store.active())


def test_the_data_version_tells_of_commits_elsewhere(store: JobStore, tmp_path: Path) -> None:
    other = JobStore(tmp_path / "jobs.sqlite")
    before = other.data_version()
    assert other.data_version() == before
    store.create(make_job(), max_active=1)
    assert other.data_version() != before
    other.close()


def test_an_unknown_job_is_named_with_those_that_are_known(store: JobStore) -> None:
    store.create(make_job("known"), max_active=1)
    with pytest.raises(SteersmanError, match=r"'other'.*known") as caught:
        store.get("other")
    assert caught.value.reason is Reason.NOT_FOUND


def test_a_page_of_long_specs_is_shorter_and_never_empty(store: JobStore) -> None:
    for name in ("a", "b", "c"):
        store.create(make_job(name), max_active=9)
    room = 2 * len(dump_spec(SPEC))
    page, following = store.list_page(max_spec_bytes=room)
    assert [job.id for job in page] == ["c", "b"]
    page, following = store.list_page(before=following, max_spec_bytes=room)
    assert ([job.id for job in page], following) == (["a"], None)
    assert [job.id for job in store.list_page(max_spec_bytes=1)[0]] == ["c"]
