"""Keeps the store true to the processes: starts what should run, notices what died, kills what will not stop.

Stateless between looks, but for what it has said: everything it decides on is in the store, so a new service goes on
where the last one ended.
"""

import asyncio
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from steersman.trainer.jobs import folder
from steersman.trainer.jobs.launcher import Launcher, WorkerStatus
from steersman.trainer.jobs.model import ACTIVE_STATES, Job, JobState
from steersman.trainer.jobs.store import JobStore
from steersman.wire.errors import Reason, SteersmanError

logger = logging.getLogger(__name__)

LOOK_SECONDS: Final = 0.25

_LOG_LINES: Final = 5


class Monitor:
    """Looks after the active jobs of a store."""

    def __init__(self, store: JobStore, launcher: Launcher, *, cancel_grace_seconds: float) -> None:
        self._store = store
        self._launcher = launcher
        self._cancel_grace_seconds = cancel_grace_seconds
        # Two looks at once, or a look between a launch and its record, could start a job twice.
        self._turn = asyncio.Lock()
        # What each job was said to wait for; a new service says it again.
        self._told: dict[str, str] = {}

    async def run(self) -> None:
        """Looks until cancelled. A look that fails is logged and tried again."""
        while True:
            try:
                await self.look()
            except Exception:
                logger.exception("cannot look after the jobs")
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Brings every active job to where its process is."""
        async with self._turn:
            active = await asyncio.to_thread(self._store.active)
            self._told = {job.id: self._told[job.id] for job in active if job.id in self._told}
            for job in active:
                try:
                    await self._look_at(job)
                except Exception as error:
                    # The worker moved the job meanwhile: it knows best.
                    moved = isinstance(error, SteersmanError) and error.reason is Reason.JOB_STATE
                    if not moved:  # and no trouble with one job may keep the others waiting
                        logger.exception("cannot look after a job", extra={"job": job.id})

    async def _look_at(self, job: Job) -> None:
        directory = Path(job.run_directory)
        if not job.handle:
            # Accepted, not launched. A locked folder has a worker that will record itself in a moment.
            try:
                launched = await asyncio.to_thread(folder.in_use, directory)
            except OSError as error:
                await self._fail(job, f"its run folder cannot be used: {error.strerror}")
                return
            if not launched:
                await self._launch(job)
            return
        status = await self._launcher.status(job.handle)
        if not status.alive:
            await self._end(job, status)
            return
        await self._tell(job, status.waiting)
        if job.state is JobState.CANCELLING:
            if time.time() - (job.cancel_time or 0.0) > self._cancel_grace_seconds:
                logger.warning("job does not stop, killing it", extra={"job": job.id})
                await self._launcher.kill(job.handle)
            else:
                # Again at every look: a signal that came before the worker listened for it is lost.
                await self._launcher.stop(job.handle)

    async def _launch(self, job: Job) -> None:
        if job.state is JobState.CANCELLING:
            await asyncio.to_thread(self._store.move, job.id, JobState.CANCELLED)
            return
        try:
            handle = await self._launcher.launch(Path(job.run_directory), job.spec.resources)
        except OSError as error:
            await self._fail(job, f"cannot start a worker: {error.strerror}")
            return
        except SteersmanError as error:
            if error.reason is not Reason.ENGINE_UNAVAILABLE:
                raise
            await self._tell(job, f"cannot start a worker yet: {error.message}")
            return
        await asyncio.to_thread(self._store.set_handle, job.id, handle)
        logger.info("job started", extra={"job": job.id, "worker": handle})

    async def _tell(self, job: Job, message: str) -> None:
        """Says what a job waits for, once: its worker may begin to tell its progress at any moment."""
        if not message:
            self._told.pop(job.id, None)
        elif self._told.get(job.id) != message:
            self._told[job.id] = message
            await asyncio.to_thread(self._store.append, job.id, [replace(job.progress, message=message)])

    async def _fail(self, job: Job, why: str) -> None:
        ended = JobState.CANCELLED if job.state is JobState.CANCELLING else JobState.FAILED
        await asyncio.to_thread(self._store.move, job.id, ended, error=why)

    async def _end(self, seen: Job, status: WorkerStatus) -> None:
        # The worker may have recorded its end between the two questions.
        job = await asyncio.to_thread(self._store.get, seen.id)
        if job.state not in ACTIVE_STATES or job.handle != seen.handle:
            return
        directory = Path(job.run_directory)
        if job.state is JobState.CANCELLING:
            await asyncio.to_thread(self._store.move, job.id, JobState.CANCELLED, error=f"worker {status.ending}")
            return
        tail = await asyncio.to_thread(folder.log_tail, directory, _LOG_LINES)
        reason = f"worker {status.ending}" + (f"; last log lines:\n{tail}" if tail else "")
        if job.restarts_left > 0:
            logger.warning("worker died, starting it again", extra={"job": job.id, "ending": status.ending})
            await asyncio.to_thread(
                self._store.restart,
                job.id,
                expected={JobState.PENDING, JobState.RUNNING},
                restarts_left=job.restarts_left - 1,
                max_active=0,
                reason=reason,
            )
        else:
            logger.warning("worker died", extra={"job": job.id, "ending": status.ending})
            await asyncio.to_thread(self._store.move, job.id, JobState.FAILED, error=reason)
