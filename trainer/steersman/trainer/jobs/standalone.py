"""Run folders of jobs that no trainer service has made: the worker makes its own, from the file that says what to run.

Such a folder has a database of its own. A folder that is there already is gone on with, if it is of the same job.
"""

import json
import logging
import time
from pathlib import Path
from typing import Final

from steersman.trainer.jobs import folder
from steersman.trainer.jobs.model import RESUMABLE_STATES, Job, JobState
from steersman.trainer.jobs.store import DATABASE_FILE, JobStore

logger = logging.getLogger(__name__)

_ONE: Final = 1


class NotThisJob(ValueError):
    """The run folder is another job's."""


def prepare(directory: Path, spec_file: Path) -> bool:
    """Makes the run folder, or gets an earlier attempt's ready. False if the job has succeeded already.

    NotThisJob if the folder is of another job, or of a trainer service. OSError and ValueError for a file or folder
    that cannot be used.
    """
    wanted = folder.parse_job_file(json.loads(spec_file.read_text(encoding="utf-8")) | {"database": DATABASE_FILE})
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / folder.JOB_FILE
    if path.exists():
        found = folder.read_job_file(directory)
        if found.database != DATABASE_FILE:
            raise NotThisJob(f"{directory} belongs to a trainer service; choose another id for the job")
        if (found.job_id, found.spec.kind, found.spec.config) != (wanted.job_id, wanted.spec.kind, wanted.spec.config):
            raise NotThisJob(
                f"{directory} holds a job {found.job_id!r} ({found.spec.kind}) of other settings; choose another id "
                "for the job, or submit it with the settings that it began with"
            )
    # Pods may be on several machines, which share no memory.
    store = JobStore(directory / DATABASE_FILE, journal="delete")
    try:
        job = Job(
            id=wanted.job_id,
            spec=wanted.spec,
            state=JobState.PENDING,
            run_directory=str(directory),
            create_time=time.time(),
        )
        known = store.list_page(limit=_ONE)[0]
        state = known[0].state if known else store.create(job, max_active=_ONE).state
        if state in RESUMABLE_STATES:
            store.restart(job.id, expected=RESUMABLE_STATES, restarts_left=0, max_active=_ONE)
    finally:
        store.close()
    # Last: with it the folder is whole.
    folder.write_job_file(directory, wanted)
    return state is not JobState.SUCCEEDED
