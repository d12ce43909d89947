"""The run folder: one owner, whole files only."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from steersman.trainer.jobs import folder
from steersman.trainer.jobs.model import JobKind, JobResources, JobSpec


def test_the_job_file_comes_back(tmp_path: Path) -> None:
    spec = JobSpec(kind=JobKind.PPO, config={"lr": 1e-5}, resources=JobResources(cpus_per_process=2))
    job = folder.JobFile(job_id="one", spec=spec, database="../jobs.sqlite")
    folder.write_job_file(tmp_path, job)
    assert folder.read_job_file(tmp_path) == job


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    folder.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        folder.write_json(path, {("no", "key"): 1})  # type: ignore[dict-item]
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    with folder.own(tmp_path):
        assert folder.in_use(tmp_path)
        with pytest.raises(folder.FolderInUse), folder.own(tmp_path):
            pytest.fail("owned twice")
    assert not folder.in_use(tmp_path)


def test_a_dead_owner_frees_the_folder(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from steersman.trainer.jobs import folder\n"
        "with folder.own(pathlib.Path(sys.argv[1])): print('owned', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "owned\n"
        assert folder.in_use(tmp_path)
        owner.kill()
        owner.wait(timeout=30)
    assert not folder.in_use(tmp_path)


def test_the_log_tail_is_the_last_lines(tmp_path: Path) -> None:
    assert folder.log_tail(tmp_path, 3) == ""
    lines = [f"line {number} " + "x" * 50 for number in range(2000)]
    (tmp_path / "log.txt").write_bytes("\n".join(lines).encode() + b"\n\xff")
    assert folder.log_tail(tmp_path, 3).splitlines() == [*lines[-2:], "\ufffd"]
