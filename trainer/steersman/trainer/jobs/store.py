"""Jobs and their events in embedded SQLite.

Invariants: a job's state and the event that tells of it change in one transaction; the events of a job are numbered
1, 2, 3, ... without gaps, whoever writes them; a move that `MOVES` does not know is refused. The service and the
workers each hold a connection of their own; WAL lets them read while another writes.
"""

import itertools
import json
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

from steersman.trainer.jobs.model import (
    ACTIVE_STATES,
    MOVES,
    EventPayload,
    Job,
    JobEvent,
    JobKind,
    JobProgress,
    JobResources,
    JobSpec,
    JobState,
    StateChange,
    StepMetrics,
)
from steersman.wire.errors import Reason, SteersmanError, not_found, queue_full

DATABASE_FILE: Final = "jobs.sqlite"

# A transaction here takes well under a millisecond; whoever waits this long sees a stuck disk.
BUSY_TIMEOUT_SECONDS: Final = 30.0

RETRY_AFTER_SECONDS: Final = 30.0

SCHEMA_VERSION: Final = 1

Journal = Literal["wal", "delete"]

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS jobs (
    ordinal INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    spec TEXT NOT NULL,
    state TEXT NOT NULL,
    run_directory TEXT NOT NULL,
    step INTEGER NOT NULL DEFAULT 0,
    total_steps INTEGER NOT NULL DEFAULT 0,
    message TEXT NOT NULL DEFAULT '',
    error TEXT NOT NULL DEFAULT '',
    create_time REAL NOT NULL,
    start_time REAL,
    end_time REAL,
    cancel_time REAL,
    num_attempts INTEGER NOT NULL DEFAULT 0,
    restarts_left INTEGER NOT NULL DEFAULT 0,
    handle TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS events (
    job_id TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    time REAL NOT NULL,
    type TEXT NOT NULL,
    payload TEXT NOT NULL,
    PRIMARY KEY (job_id, sequence)
) WITHOUT ROWID;
"""


class JobStore:
    """One connection to the database. Methods block for a short transaction; call them off the event loop.

    Thread-safe: calls take turns.

    `journal` is how commits are made whole: "wal", the faster, needs all processes on one machine, since they share
    memory; "delete" needs only a file system whose locks hold between machines. None leaves it as the service chose.
    """

    def __init__(self, path: Path, *, journal: Journal | None = "wal") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._turn = threading.Lock()
        self._connection = sqlite3.connect(
            path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
        )
        self._connection.row_factory = sqlite3.Row
        if journal is not None:
            self._choose_journal(path, journal)
        (mode,) = self._connection.execute("PRAGMA journal_mode").fetchone()
        # With a WAL a power cut may lose the last events, never the consistency; metrics.jsonl has them all.
        self._connection.execute(f"PRAGMA synchronous = {'NORMAL' if mode == 'wal' else 'FULL'}")
        with self._transaction() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise SteersmanError(
                    Reason.INTERNAL, f"{path} has schema {version}, this program knows up to {SCHEMA_VERSION}"
                )
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _choose_journal(self, path: Path, journal: Journal) -> None:
        try:
            (mode,) = self._connection.execute(f"PRAGMA journal_mode = {journal}").fetchone()
        except sqlite3.OperationalError as error:
            mode = str(error)
        if mode != journal:
            self._connection.close()
            message = f"{path} cannot be used with journal {journal} ({mode}); end the workers that have it open"
            raise SteersmanError(Reason.INTERNAL, message)

    def close(self) -> None:
        """Closes the connection."""
        with self._turn:
            self._connection.close()

    def create(self, job: Job, *, max_active: int) -> Job:
        """Records a new job with its first event. Errors: ALREADY_EXISTS, QUEUE_FULL at `max_active` active jobs."""
        with self._transaction() as connection:
            if connection.execute("SELECT 1 FROM jobs WHERE id = ?", (job.id,)).fetchone():
                raise SteersmanError(Reason.ALREADY_EXISTS, f"a job called {job.id!r} exists")
            self._check_room(connection, max_active)
            connection.execute(
                "INSERT INTO jobs (id, spec, state, run_directory, create_time, restarts_left)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (job.id, dump_spec(job.spec), job.state, job.run_directory, job.create_time, job.restarts_left),
            )
            _append(connection, job.id, StateChange(state=job.state))
            return _get(connection, job.id)

    def get(self, job_id: str) -> Job:
        """The job. Errors: NOT_FOUND."""
        with self._reading() as connection:
            return _get(connection, job_id)

    def list_page(
        self,
        *,
        states: Collection[JobState] = (),
        before: int | None = None,
        limit: int = 100,
        max_spec_bytes: int | None = None,
    ) -> tuple[list[Job], int | None]:
        """Jobs, newest first, with the `before` of the next page (None on the last).

        At most `limit` of them, and only one if its spec alone is longer than `max_spec_bytes` of JSON.
        """
        clauses, values = ["1"], list[Any]()
        if states:
            clauses.append(f"state IN ({', '.join('?' * len(states))})")
            values += [str(state) for state in states]
        if before is not None:
            clauses.append("ordinal < ?")
            values.append(before)
        query = f"SELECT * FROM jobs WHERE {' AND '.join(clauses)} ORDER BY ordinal DESC LIMIT ?"
        with self._reading() as connection:
            rows = connection.execute(query, (*values, limit + 1)).fetchall()
        sizes = itertools.accumulate(len(row["spec"]) for row in rows[:limit])
        fitting = sum(max_spec_bytes is None or size <= max_spec_bytes for size in sizes)
        page = rows[: max(1, fitting)]
        return [_job(row) for row in page], int(page[-1]["ordinal"]) if len(rows) > len(page) else None

    def active(self) -> list[Job]:
        """Jobs that have a worker, or should have one."""
        return self.list_page(states=ACTIVE_STATES, limit=10_000)[0]

    def move(
        self, job_id: str, state: JobState, *, error: str = "", expected: Collection[JobState] | None = None
    ) -> Job:
        """Moves a job and appends the event. Errors: NOT_FOUND; JOB_STATE if the job is not in one of the `expected`
        states, or may not move from its state to `state`."""
        with self._transaction() as connection:
            return _move(connection, job_id, state, error=error, expected=expected)

    def restart(
        self, job_id: str, *, expected: Collection[JobState], restarts_left: int, max_active: int, reason: str = ""
    ) -> Job:
        """Moves a job back to PENDING for another attempt. Errors: those of `move`, and QUEUE_FULL."""
        with self._transaction() as connection:
            if not _get(connection, job_id).active:
                self._check_room(connection, max_active)
            _move(connection, job_id, JobState.PENDING, error=reason, expected=expected)
            connection.execute(
                "UPDATE jobs SET handle = '', restarts_left = ?, end_time = NULL, cancel_time = NULL WHERE id = ?",
                (restarts_left, job_id),
            )
            return _get(connection, job_id)

    def begin(self, job_id: str, handle: str) -> Job:
        """What a worker calls once it owns the run folder: the job is RUNNING, unless it was cancelled meanwhile.

        Errors: JOB_STATE if the job has ended.
        """
        with self._transaction() as connection:
            job = _get(connection, job_id)
            if not job.active:
                raise _wrong_state(job, ACTIVE_STATES)
            connection.execute(
                "UPDATE jobs SET handle = ?, start_time = ?, num_attempts = num_attempts + 1 WHERE id = ?",
                (handle, time.time(), job_id),
            )
            if job.state is JobState.PENDING:
                return _move(connection, job_id, JobState.RUNNING)
            return _get(connection, job_id)

    def set_handle(self, job_id: str, handle: str) -> None:
        """Remembers the worker that the launcher started, unless the worker has done so itself."""
        with self._transaction() as connection:
            connection.execute("UPDATE jobs SET handle = ? WHERE id = ? AND handle = ''", (handle, job_id))

    def append(self, job_id: str, payloads: Sequence[JobProgress | StepMetrics]) -> None:
        """Appends events that do not change the state, all in one transaction."""
        with self._transaction() as connection:
            for payload in payloads:
                _append(connection, job_id, payload)
                if isinstance(payload, JobProgress):
                    connection.execute(
                        "UPDATE jobs SET step = ?, total_steps = ?, message = ? WHERE id = ?",
                        (payload.step, payload.total_steps, payload.message, job_id),
                    )

    def events(self, job_id: str, *, after: int, limit: int = 256) -> list[JobEvent]:
        """Events with a sequence above `after`, in order. Errors: NOT_FOUND."""
        with self._reading() as connection:
            _get(connection, job_id)
            rows = connection.execute(
                "SELECT * FROM events WHERE job_id = ? AND sequence > ? ORDER BY sequence LIMIT ?",
                (job_id, after, limit),
            ).fetchall()
        return [_event(row) for row in rows]

    def last_sequence(self, job_id: str) -> int:
        """Sequence of the newest event. Errors: NOT_FOUND."""
        with self._reading() as connection:
            _get(connection, job_id)
            query = "SELECT COALESCE(MAX(sequence), 0) FROM events WHERE job_id = ?"
            return int(connection.execute(query, (job_id,)).fetchone()[0])

    def newest_metrics(self, job_id: str) -> StepMetrics | None:
        """The metrics of the newest step; None before the first, and for a job that is not known."""
        query = "SELECT * FROM events WHERE job_id = ? AND type = ? ORDER BY sequence DESC LIMIT 1"
        with self._reading() as connection:
            row = connection.execute(query, (job_id, _TYPE_NAMES[StepMetrics])).fetchone()
        return None if row is None else StepMetrics(**json.loads(row["payload"]))

    def data_version(self) -> int:
        """A number that changes when *another* connection commits: a cheap question before a query."""
        with self._reading() as connection:
            return int(connection.execute("PRAGMA data_version").fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        # IMMEDIATE takes the write lock at once; a deferred transaction that turns into a writer can fail halfway.
        with self._turn:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._turn:
            yield self._connection

    @staticmethod
    def _check_room(connection: sqlite3.Connection, max_active: int) -> None:
        marks = ", ".join("?" * len(ACTIVE_STATES))
        query = f"SELECT COUNT(*) FROM jobs WHERE state IN ({marks})"
        if connection.execute(query, [str(state) for state in ACTIVE_STATES]).fetchone()[0] >= max_active:
            raise queue_full("the list of running jobs", max_active, RETRY_AFTER_SECONDS)


def _wrong_state(job: Job, allowed: Collection[JobState]) -> SteersmanError:
    names = ", ".join(sorted(str(state) for state in allowed))
    return SteersmanError(Reason.JOB_STATE, f"job {job.id!r} is {job.state}, allowed: {names}")


def _get(connection: sqlite3.Connection, job_id: str) -> Job:
    row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        recent = connection.execute("SELECT id FROM jobs ORDER BY ordinal DESC LIMIT 10").fetchall()
        raise not_found("job", job_id, [known["id"] for known in recent])
    return _job(row)


def _move(
    connection: sqlite3.Connection,
    job_id: str,
    state: JobState,
    *,
    error: str = "",
    expected: Collection[JobState] | None = None,
) -> Job:
    job = _get(connection, job_id)
    sources = {source for source, targets in MOVES.items() if state in targets}
    allowed = sources if expected is None else sources & set(expected)
    if job.state not in allowed:
        raise _wrong_state(job, allowed)
    now = time.time()
    # While a job waits for its next attempt, the reason of the last death stays readable in its event alone.
    connection.execute(
        "UPDATE jobs SET state = ?, error = ? WHERE id = ?",
        (state, error if state is JobState.FAILED else "", job_id),
    )
    if state is JobState.CANCELLING:
        connection.execute("UPDATE jobs SET cancel_time = ? WHERE id = ?", (now, job_id))
    if state not in ACTIVE_STATES:
        connection.execute("UPDATE jobs SET end_time = ? WHERE id = ?", (now, job_id))
    _append(connection, job_id, StateChange(state=state, error=error))
    return _get(connection, job_id)


def _append(connection: sqlite3.Connection, job_id: str, payload: EventPayload) -> None:
    connection.execute(
        "INSERT INTO events (job_id, sequence, time, type, payload) SELECT ?1,"
        " (SELECT COALESCE(MAX(sequence), 0) + 1 FROM events WHERE job_id = ?1), ?2, ?3, ?4",
        (job_id, time.time(), _TYPE_NAMES[type(payload)], json.dumps(asdict(payload))),
    )


_TYPE_NAMES: Final[dict[type, str]] = {StateChange: "state", JobProgress: "progress", StepMetrics: "metrics"}


def _event(row: sqlite3.Row) -> JobEvent:
    values = json.loads(row["payload"])
    payload: EventPayload
    match row["type"]:
        case "state":
            payload = StateChange(state=JobState(values["state"]), error=values["error"])
        case "progress":
            payload = JobProgress(**values)
        case _:
            payload = StepMetrics(**values)
    return JobEvent(sequence=row["sequence"], time=row["time"], payload=payload)


def dump_spec(spec: JobSpec) -> str:
    """The JSON form of a spec."""
    return json.dumps({"kind": spec.kind, "config": dict(spec.config), "resources": asdict(spec.resources)})


def load_spec(text: str) -> JobSpec:
    """The spec of its JSON form."""
    values = json.loads(text)
    return JobSpec(kind=JobKind(values["kind"]), config=values["config"], resources=JobResources(**values["resources"]))


def _job(row: sqlite3.Row) -> Job:
    return Job(
        id=row["id"],
        spec=load_spec(row["spec"]),
        state=JobState(row["state"]),
        run_directory=row["run_directory"],
        create_time=row["create_time"],
        progress=JobProgress(step=row["step"], total_steps=row["total_steps"], message=row["message"]),
        error=row["error"],
        start_time=row["start_time"],
        end_time=row["end_time"],
        cancel_time=row["cancel_time"],
        num_attempts=row["num_attempts"],
        restarts_left=row["restarts_left"],
        handle=row["handle"],
    )
