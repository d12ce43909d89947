"""Real workers that make their run folder themselves, from what the command puts into a Job."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from steersman.cli import cluster
from steersman.cli.cluster_jobs import job_objects
from steersman.client.types import JobKind
from steersman.cluster.lines import read
from steersman.cluster.resources import JobResources
from steersman.cluster.settings import KubernetesSettings
from steersman.wire.errors import SteersmanError

PROGRAM = str(Path(__file__).with_name("worker_program.py"))


class Pod:
    """A pod of a Job: its annotation as a file, its worker as a process."""

    def __init__(self, folder: Path, **config: Any) -> None:
        settings = KubernetesSettings(image="trainer:1", run_claim="runs", run_mount_path=str(folder / "runs"))
        things = job_objects("mine", JobKind.SFT, config, JobResources(), settings, namespace="rl")
        template = things[0]["spec"]["template"]
        self.spec = folder / "job.json"
        self.spec.write_text(template["metadata"]["annotations"]["steersman/job"])
        (container,) = template["spec"]["containers"]
        self.run = Path(container["command"][-1])

    async def start(self) -> asyncio.subprocess.Process:
        environment = {"STEERSMAN_WORKER_HANDLE": "rl/steersman-mine-1/uid", "STEERSMAN_WORKER_SPEC": str(self.spec)}
        return await asyncio.create_subprocess_exec(
            *(sys.executable, PROGRAM, str(self.run)),
            env=dict(os.environ) | environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )


async def finished(worker: asyncio.subprocess.Process) -> tuple[int, list[str]]:
    async with asyncio.timeout(90):
        output, _ = await worker.communicate()
    assert worker.returncode is not None
    return worker.returncode, output.decode().splitlines()


async def test_a_worker_makes_its_folder_is_preempted_and_goes_on(tmp_path: Path) -> None:
    pod = Pod(tmp_path, steps=4, halfway="wait")
    worker = await pod.start()
    async with asyncio.timeout(90):
        while not (pod.run / "count.json").exists() or json.loads((pod.run / "count.json").read_text())["step"] < 2:
            await asyncio.sleep(0.02)
    worker.send_signal(signal.SIGTERM)
    code, first = await finished(worker)
    assert code == 143
    code, second = await finished(await pod.start())
    assert code == 0
    told = [one for one in map(read, [*first, *second]) if one is not None]
    assert [int(one.metrics["count"]) for one in told if one.metrics] == [1, 2, 3, 4]
    assert (told[-1].step, told[-1].total_steps) == (4, 4)
    # A pod that was lost between its last word and its end.
    assert (await finished(await pod.start()))[0] == 0
    rows = (pod.run / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 4


async def test_a_failed_job_goes_on_with_the_next_attempt(tmp_path: Path) -> None:
    pod = Pod(tmp_path, steps=4, halfway="fail")
    code, output = await finished(await pod.start())
    assert code == 1
    assert "ValueError: counted the wrong way" in "\n".join(output)
    assert (await finished(await pod.start()))[0] == 0


async def test_the_folder_of_another_job_is_left_alone(tmp_path: Path) -> None:
    assert (await finished(await Pod(tmp_path, steps=1).start()))[0] == 0
    other = Pod(tmp_path, steps=2)
    before = sorted(other.run.iterdir())
    code, output = await finished(await other.start())
    assert code == 1
    assert "holds a job 'mine' (sft) of other settings; choose another id" in output[-1]
    assert sorted(other.run.iterdir()) == before
    # One of a trainer service reports to the database of that.
    job = json.loads((other.run / "job.json").read_text())
    (other.run / "job.json").write_text(json.dumps(job | {"database": "../jobs.sqlite"}))
    code, output = await finished(await other.start())
    assert (code, "belongs to a trainer service" in output[-1]) == (1, True)


def test_settings_are_checked_before_anything_is_made() -> None:
    with pytest.raises(SteersmanError) as caught:
        cluster.check_settings(JobKind.SFT, {"nonsense": 1})
    fields = {violation.field for violation in caught.value.violations}
    assert "spec.config.nonsense" in fields
    assert len(fields) > 1
