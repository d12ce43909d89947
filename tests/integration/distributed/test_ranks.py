import json
from pathlib import Path

from torchrun import ended, torchrun

from steersman.trainer.jobs import standalone
from steersman.trainer.jobs.model import JobState
from steersman.trainer.jobs.store import DATABASE_FILE, JobStore

PROGRAM = str(Path(__file__).with_name("ranks_program.py"))


async def test_ranks_talk_and_the_lead_says_which_one_failed_and_why(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    async with torchrun(2, log, PROGRAM, str(tmp_path)) as process:
        assert await ended(process) == 1
    assert (tmp_path / "lead.json").exists(), log.read_text()
    assert json.loads((tmp_path / "lead.json").read_text()) == {
        "rank": 0,
        "size": 2,
        "device": "cpu",
        "sum": [1.0, 3.0, 5.0],
        "any": [True, False],
        "sent": True,
        "empty": True,
        "stop_asked": True,
        "error": "rank 1 of 2 failed: ValueError: the disk is full",
    }


async def test_the_error_of_the_lead_is_that_of_the_job_and_not_what_the_others_make_of_it(tmp_path: Path) -> None:
    spec, directory, log = tmp_path / "spec.json", tmp_path / "run", tmp_path / "log.txt"
    spec.write_text(json.dumps({"job_id": "failing", "kind": "sft", "config": {}, "resources": {}}))
    assert standalone.prepare(directory, spec)
    async with torchrun(2, log, str(Path(__file__).with_name("failing_worker.py")), str(directory)) as process:
        assert await ended(process) == 1
    store = JobStore(directory / DATABASE_FILE, journal=None)
    try:
        job = store.get("failing")
    finally:
        store.close()
    assert (job.state, job.error) == (JobState.FAILED, "rank 0 of 2 failed: ValueError: there is no such model")
