"""Local workers: known by id and start time, killed with their children, their end described."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from steersman.trainer.jobs.launcher import MAX_LOG_BYTES, LocalLauncher, LogPart, WorkerStatus, process_handle
from steersman.trainer.jobs.model import JobResources
from steersman.wire.errors import SteersmanError

SLEEPER = (sys.executable, "-c", "import sys, time; print('up', sys.argv[1], flush=True); time.sleep(600)")


async def until(condition: Callable[[], bool], timeout: float = 30.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_worker_lives_in_a_session_of_its_own_and_writes_a_log(tmp_path: Path) -> None:
    launcher = LocalLauncher(SLEEPER)
    handle = await launcher.launch(tmp_path, JobResources())
    pid = json.loads(handle)["pid"]
    try:
        assert os.getsid(pid) == pid
        assert (await launcher.status(handle)).alive
        # A service that did not start it knows it too.
        assert (await LocalLauncher().status(handle)).alive
        await until(lambda: f"up {tmp_path}" in (tmp_path / "log.txt").read_text())
    finally:
        await launcher.kill(handle)
    launcher._children[pid].wait(timeout=30)
    assert await launcher.status(handle) == WorkerStatus(
        alive=False, ending="was killed by SIGKILL (the kernel does that when memory runs out)"
    )
    await launcher.stop(handle)
    await launcher.kill(handle)


async def test_a_zombie_is_dead() -> None:
    command = (sys.executable, "-c", "input()")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        handle = process_handle(child.pid)
        assert (await LocalLauncher().status(handle)).alive
        child.kill()
        await asyncio.to_thread(os.waitid, os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        status = await LocalLauncher().status(handle)
    assert status == WorkerStatus(alive=False, ending="ended while no service watched it")


async def test_another_process_of_the_same_id_is_not_the_worker() -> None:
    with subprocess.Popen(SLEEPER, stdout=subprocess.DEVNULL) as process:
        try:
            real = json.loads(process_handle(process.pid))
            forged = json.dumps(real | {"start": real["start"] + "1"})
            launcher = LocalLauncher()
            assert not (await launcher.status(forged)).alive
            await launcher.kill(forged)
            assert process.poll() is None
            assert (await launcher.status(json.dumps(real))).alive
        finally:
            process.kill()


async def test_a_worker_in_a_cluster_is_none_of_its_own() -> None:
    assert "another kind of launcher" in (await LocalLauncher().status("rl/steersman-first-1/uid")).ending


@pytest.mark.parametrize(
    ("resources", "field"),
    [
        (JobResources(num_processes=100_000), "spec.resources.num_processes"),
        (JobResources(num_processes=-1), "spec.resources.num_processes"),
        (JobResources(num_processes=1, processes_per_node=2), "spec.resources.processes_per_node"),
        (JobResources(cpus_per_process=-1), "spec.resources.cpus_per_process"),
        (JobResources(memory_bytes_per_process=1), "spec.resources.memory_bytes_per_process"),
        (JobResources(queue_name="q"), "spec.resources.queue_name"),
        (JobResources(image="i"), "spec.resources.image"),
    ],
)
def test_what_a_local_job_cannot_have_is_named(resources: JobResources, field: str) -> None:
    assert [violation.field for violation in LocalLauncher().check(resources)] == [field]


async def test_cpus_bound_the_threads(tmp_path: Path) -> None:
    program = "import os; print(os.environ['OMP_NUM_THREADS'])"
    launcher = LocalLauncher((sys.executable, "-c", program))
    handle = await launcher.launch(tmp_path, JobResources(cpus_per_process=1.5))
    launcher._children[json.loads(handle)["pid"]].wait(timeout=30)
    assert (tmp_path / "log.txt").read_text() == "1\n"


def test_cpus_beyond_the_machine_are_refused() -> None:
    for cpus in (-1.0, 1e300, float("inf"), float("nan")):
        (violation,) = LocalLauncher().check(JobResources(cpus_per_process=cpus))
        assert violation.field == "spec.resources.cpus_per_process"
        assert violation.description.endswith("of this machine")
    assert LocalLauncher().check(JobResources(cpus_per_process=0.5)) == []


async def test_a_log_is_read_on_from_where_it_was_left(tmp_path: Path) -> None:
    launcher = LocalLauncher()
    assert (await launcher.read_log("", tmp_path, LogPart())).lines == ()
    log = tmp_path / "log.txt"
    log.write_text("one\ntwo\nthr")
    first = await launcher.read_log("", tmp_path, LogPart())
    assert first.lines == ["one", "two"]
    log.write_text("one\ntwo\nthree\n")
    assert (await launcher.read_log("", tmp_path, LogPart(cursor=first.cursor))).lines == ["three"]
    last = await launcher.read_log("", tmp_path, LogPart(tail_lines=1))
    assert last.lines == ["three"]
    assert (await launcher.read_log("", tmp_path, LogPart(cursor=last.cursor))).lines == []
    with pytest.raises(SteersmanError, match="page_token"):
        await launcher.read_log("", tmp_path, LogPart(cursor="-1"))


async def test_a_long_log_comes_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("x" * (MAX_LOG_BYTES - 5) + "\n" + "y" * 10 + "\n")
    first = await LocalLauncher().read_log("", tmp_path, LogPart())
    assert (first.more, len(first.lines)) == (True, 1)
    second = await LocalLauncher().read_log("", tmp_path, LogPart(cursor=first.cursor))
    assert (second.more, second.lines) == (False, ["y" * 10])
