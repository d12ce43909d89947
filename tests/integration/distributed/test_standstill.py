"""A rank that stands still without dying is found and named, and its job can be started again."""

import json
import re
import socket
from pathlib import Path

import pytest
from torchrun import ended, torchrun

from steersman.trainer.jobs import standalone
from steersman.trainer.jobs.model import JobState
from steersman.trainer.jobs.store import DATABASE_FILE, JobStore

# On a busy machine each rank takes a minute to start.
pytestmark = pytest.mark.timeout(900)
PROGRAM = str(Path(__file__).with_name("standing_worker.py"))
# Longer than a live rank of a busy machine gives no sign.
PATIENCE_SECONDS = 15


def state_of(directory: Path) -> tuple[JobState, str]:
    store = JobStore(directory / DATABASE_FILE, journal=None)
    try:
        job = store.get("standing")
        return job.state, job.error
    finally:
        store.close()


@pytest.mark.parametrize("how", ["stopped", "asleep"])
async def test_a_rank_that_stands_still_ends_the_job_with_its_name_and_its_stacks(how: str, tmp_path: Path) -> None:
    spec, directory, log = tmp_path / "spec.json", tmp_path / "run", tmp_path / "log.txt"
    config = {"how": how, "patience": PATIENCE_SECONDS}
    spec.write_text(json.dumps({"job_id": "standing", "kind": "sft", "config": config, "resources": {}}))
    assert standalone.prepare(directory, spec)
    async with torchrun(2, log, PROGRAM, str(directory)) as process:
        assert await ended(process) == 1, log.read_text()
    state, error = state_of(directory)
    assert state is JobState.FAILED, log.read_text()
    because = r"no sign of it for \d+ s" if how == "stopped" else r"it has not got on for \d+ s.*"
    assert re.match(
        rf"rank 1 of 2 on node {re.escape(socket.gethostname())} stands still: {because}\. "
        r"It last did: step 3 of 9: updating\. The others: rank 0: step 3 of 9: updating \(waits for others\)\.",
        error,
    ), error
    # Where it stands, and where the other one waits for it.
    assert "in stand\n" in log.read_text()
    assert "in barrier\n" in log.read_text()

    # It may be started again.
    assert standalone.prepare(directory, spec)
    assert state_of(directory)[0] is JobState.PENDING
