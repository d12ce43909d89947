"""What each method of TrainerService does; no grpc, no protobuf."""

import asyncio
import logging
import os
import re
import secrets
import shutil
import sqlite3
import time
from collections.abc import AsyncGenerator, Collection
from contextlib import suppress
from pathlib import Path
from typing import Final

from steersman.trainer.jobs import folder
from steersman.trainer.jobs.launcher import Launcher, LogLines, LogPart
from steersman.trainer.jobs.model import (
    ACTIVE_STATES,
    RESUMABLE_STATES,
    Job,
    JobEvent,
    JobKind,
    JobSpec,
    JobState,
    StepMetrics,
)
from steersman.trainer.jobs.monitor import Monitor
from steersman.trainer.jobs.store import DATABASE_FILE, JobStore, Journal, dump_spec
from steersman.trainer.jobs.validation import Validator
from steersman.wire.errors import Reason, SteersmanError, invalid_field, unavailable
from steersman.wire.limits import MIB

logger = logging.getLogger(__name__)

JOB_ID_PATTERN: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
MAX_PAGE_SIZE: Final = 1000
MAX_TAIL_LINES: Final = 10_000
DEFAULT_PAGE_SIZE: Final = 100
# Thousands of file names; a job is sent whole whenever it is shown.
MAX_SPEC_BYTES: Final = 256 * 1024
# Of a page: far below what a message holds, with room for errors beside the specs.
MAX_PAGE_SPEC_BYTES: Final = 16 * MIB

# How soon a watcher hears of an event: far below what a person notices, and cheap (one pragma a tick for all watchers).
TICK_SECONDS: Final = 0.05
# A watcher looks this often even if no tick told of a change.
PATIENCE_SECONDS: Final = 2.0


class JobsHandler:
    """Creates, shows, stops and resumes jobs. `start` before the first call, `close` after the last."""

    def __init__(
        self,
        runs_directory: Path,
        *,
        launcher: Launcher,
        validator: Validator,
        max_running_jobs: int = 4,
        cancel_grace_seconds: float = 60.0,
        max_attempts: int = 1,
        journal: Journal = "wal",
    ) -> None:
        self._runs = runs_directory.resolve()
        self._database = self._runs / DATABASE_FILE
        self._store = JobStore(self._database, journal=journal)
        # Never writes: only so does its data_version change with every commit.
        self._ticker_store = JobStore(self._database, journal=None)
        self._launcher = launcher
        self._validator = validator
        self._max_running_jobs = max_running_jobs
        self._max_attempts = max_attempts
        self._monitor = Monitor(self._store, launcher, cancel_grace_seconds=cancel_grace_seconds)
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._num_watchers = 0
        self._draining = False

    async def start(self) -> None:
        """Adopts the jobs of an earlier service, and begins to look after them."""
        await self._monitor.look()
        self._tasks = [asyncio.create_task(self._monitor.run()), asyncio.create_task(self._tick())]

    async def check_health(self) -> None:
        """Raises if the database does not answer."""
        await asyncio.to_thread(self._store.data_version)

    async def drain(self) -> None:
        """Ends the watches; their clients go on with the next service."""
        self._draining = True
        self._wake()

    async def close(self) -> None:
        """Stops looking. Jobs go on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._store.close()
        self._ticker_store.close()

    async def create(self, job_id: str, spec: JobSpec, *, validate_only: bool = False) -> Job:
        """Checks a job and starts it. Errors: INVALID_FIELD, ALREADY_EXISTS, QUEUE_FULL."""
        if job_id and not JOB_ID_PATTERN.fullmatch(job_id):
            allowed = "1 to 63 lower-case letters, digits and hyphens, neither first nor last a hyphen"
            raise invalid_field("job_id", job_id, allowed)
        job_id = job_id or new_job_id(spec.kind)
        if violations := self._launcher.check(spec.resources):
            message = "; ".join(f"{violation.field} {violation.description}" for violation in violations)
            raise SteersmanError(Reason.INVALID_FIELD, message, violations=violations)
        num_bytes = len(dump_spec(spec))
        if num_bytes > MAX_SPEC_BYTES:
            raise invalid_field("spec", f"{num_bytes} bytes as JSON", f"at most {MAX_SPEC_BYTES}")
        await self._validator.check(spec.kind, spec.config)
        directory = self._runs / job_id
        job = Job(
            id=job_id,
            spec=spec,
            state=JobState.PENDING,
            run_directory=str(directory),
            create_time=time.time(),
            restarts_left=self._max_attempts - 1,
        )
        if validate_only:
            return job
        job = await asyncio.to_thread(self._create, job, directory)
        await self._monitor.look()
        return await self.get(job.id)

    def _create(self, job: Job, directory: Path) -> Job:
        # The folder first: it is what a second job of this id, or a run that no job knows, would collide with.
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            raise SteersmanError(Reason.ALREADY_EXISTS, f"a run folder called {job.id!r} exists") from None
        try:
            database = os.path.relpath(self._database, directory)
            folder.write_job_file(directory, folder.JobFile(job_id=job.id, spec=job.spec, database=database))
            return self._store.create(job, max_active=self._max_running_jobs)
        except BaseException as error:
            # Made above and seen by nobody yet.
            shutil.rmtree(directory, ignore_errors=True)
            if isinstance(error, OSError | sqlite3.OperationalError):
                logger.exception("cannot record a job", extra={"job": job.id})
                why = getattr(error, "strerror", None) or str(error)
                raise unavailable(f"the runs directory of the service cannot be written to: {why}") from error
            raise

    async def describe(self, job: Job) -> str:
        """The objects that starting a job would make, as YAML; empty if it would be a process of this machine."""
        return await self._launcher.describe(Path(job.run_directory), job.spec)

    async def get(self, job_id: str) -> Job:
        """The job. Errors: NOT_FOUND."""
        return await asyncio.to_thread(self._store.get, job_id)

    async def list_page(
        self, *, page_size: int, page_token: str, states: Collection[JobState]
    ) -> tuple[list[Job], str]:
        """Jobs, newest first, and the token of the next page (empty on the last)."""
        if not 0 <= page_size <= MAX_PAGE_SIZE:
            raise invalid_field("page_size", page_size, f"1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}")
        if page_token and not (page_token.isascii() and page_token.isdigit() and len(page_token) < 19):
            raise invalid_field("page_token", page_token, "the next_page_token of the page before")
        jobs, following = await asyncio.to_thread(
            self._store.list_page,
            states=states,
            before=int(page_token) if page_token else None,
            limit=page_size or DEFAULT_PAGE_SIZE,
            max_spec_bytes=MAX_PAGE_SPEC_BYTES,
        )
        return jobs, "" if following is None else str(following)

    async def cancel(self, job_id: str) -> Job:
        """Asks a job to stop; asking again changes nothing. Errors: NOT_FOUND, JOB_STATE if it has ended."""
        job = await self.get(job_id)
        if job.state is not JobState.CANCELLING:
            expected = ACTIVE_STATES
            await asyncio.to_thread(self._store.move, job_id, JobState.CANCELLING, expected=expected)
        await self._monitor.look()
        return await self.get(job_id)

    async def resume(self, job_id: str) -> Job:
        """Starts a failed or cancelled job again. Errors: NOT_FOUND, JOB_STATE, QUEUE_FULL."""
        await asyncio.to_thread(
            self._store.restart,
            job_id,
            expected=RESUMABLE_STATES,
            restarts_left=self._max_attempts - 1,
            max_active=self._max_running_jobs,
        )
        await self._monitor.look()
        return await self.get(job_id)

    async def watch(self, job_id: str, after_sequence: int) -> AsyncGenerator[JobEvent, None]:
        """Events after a sequence number, until the job has ended. Errors: NOT_FOUND, INVALID_FIELD,
        ENGINE_UNAVAILABLE when the service ends first."""
        if after_sequence < 0:
            raise invalid_field("after_sequence", after_sequence, "0 or more")
        last = await asyncio.to_thread(self._store.last_sequence, job_id)
        if after_sequence > last:
            raise invalid_field("after_sequence", after_sequence, f"0 to {last}, the last event of {job_id!r}")
        self._num_watchers += 1
        try:
            while not self._draining:
                changed = self._changed
                # The state first: the events read after it include the one that ended the job.
                job = await self.get(job_id)
                events = await asyncio.to_thread(self._store.events, job_id, after=after_sequence)
                for event in events:
                    after_sequence = event.sequence
                    yield event
                if events:
                    continue
                if not job.active:
                    return
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), PATIENCE_SECONDS)
            raise unavailable("the trainer service is stopping; the job goes on, watch it again")
        finally:
            self._num_watchers -= 1

    async def read_log(self, job_id: str, part: LogPart) -> tuple[LogLines, bool]:
        """Lines that a job's worker has printed, and whether there will be no more. Errors: NOT_FOUND, INVALID_FIELD,
        ENGINE_UNAVAILABLE."""
        if not 0 <= part.tail_lines <= MAX_TAIL_LINES:
            raise invalid_field("tail_lines", part.tail_lines, f"0 to {MAX_TAIL_LINES}")
        if part.node < 0:
            raise invalid_field("node", part.node, "0 or more")
        # The state first: what is read after it includes the last lines of a job that has ended.
        job = await self.get(job_id)
        lines = await self._launcher.read_log(job.handle, Path(job.run_directory), part)
        return lines, not job.active and not lines.more

    async def count_by_state(self) -> dict[JobState, int]:
        """Active jobs by state, for the metrics."""
        active = await asyncio.to_thread(self._store.active)
        return {state: sum(job.state is state for job in active) for state in sorted(ACTIVE_STATES)}

    def readings(self) -> list[tuple[Job, StepMetrics | None]]:
        """Active jobs with the metrics of their newest steps. Blocks; sqlite3.Error if the database does not answer."""
        return [(job, self._store.newest_metrics(job.id)) for job in self._store.active()]

    async def _tick(self) -> None:
        version = -1
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if self._num_watchers == 0:
                continue
            now = await asyncio.to_thread(self._ticker_store.data_version)
            if now != version:
                version = now
                self._wake()

    def _wake(self) -> None:
        """Wakes every watcher that waits now; those that come later wait for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()


def new_job_id(kind: JobKind) -> str:
    """An id that tells the kind and the time, and is new."""
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return f"{kind.replace('_', '-')}-{moment}-{secrets.token_hex(2)}"
