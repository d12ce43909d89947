"""TrainerService with jobs in a cluster: a real server and the official client, against an API server in the test.

The test plays the controllers, and the workers through the store.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import Refusal
from job_api_server import JobApiServer

from steersman.client.trainer import AsyncTrainerClient
from steersman.client.types import Job, JobResources
from steersman.serving.metrics import Metrics
from steersman.serving.server import RunningServer, start_server
from steersman.trainer.jobs.model import JobProgress, JobState
from steersman.trainer.jobs.service import build, make_launcher
from steersman.trainer.jobs.settings import TrainerSettings
from steersman.trainer.jobs.store import DATABASE_FILE, JobStore
from steersman.wire.errors import Reason, SteersmanError

CLUSTER: dict[str, Any] = {
    "image": "trainer:1",
    "run_claim": "runs",
    "run_as_user": 1000,
    "run_as_group": 1000,
    "poll_seconds": 0.01,
}
UNSCHEDULABLE = {
    "phase": "Pending",
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes: no nvidia.com/gpu",
        }
    ],
}


class AnyConfig:
    async def check(self, kind: object, config: object) -> None:
        """Everything is fine."""


class Fixture:
    def __init__(self, runs: Path, cluster: JobApiServer) -> None:
        self.runs = runs
        self.cluster = cluster
        self._server: RunningServer
        self.client: AsyncTrainerClient

    async def start(self) -> None:
        settings = TrainerSettings(
            port=0, metrics_port=None, runs_directory=self.runs, launcher="kubernetes", kubernetes=CLUSTER
        )
        metrics = Metrics("trainer")
        service = await build(settings, metrics, validator=AnyConfig())
        self._server = await start_server(service, settings, metrics)
        self.client = AsyncTrainerClient(self._server.address)
        self.worker = JobStore(self.runs / DATABASE_FILE, journal=None)

    async def stop(self) -> None:
        await self.client.close()
        await self._server.stop(5.0)
        self.worker.close()

    async def until(self, job_id: str, condition: Callable[[Job], bool]) -> Job:
        async with asyncio.timeout(30):
            while not condition(job := await self.client.get_job(job_id)):
                await asyncio.sleep(0.02)
        return job

    def begin(self, job_id: str) -> str:
        """The worker of the newest Job begins. Returns the name of the Job."""
        name = self.cluster.jobs()[-1]
        self.worker.begin(job_id, f"rl/{name}/{self.cluster.job(name)['metadata']['uid']}")
        return name


@pytest.fixture
async def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fixture]:
    with JobApiServer() as cluster:
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(cluster.kubeconfig()))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        # Read by the client when it was imported.
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        fixture = Fixture(tmp_path / "runs", cluster)
        await fixture.start()
        yield fixture
        await fixture.stop()


async def test_a_dry_run_shows_the_objects_and_makes_none(service: Fixture) -> None:
    objects = await service.client.preview_job("sft", {}, job_id="first", resources=JobResources(queue_name="research"))
    job = yaml.safe_load(objects)
    assert (job["kind"], job["metadata"]["name"], job["spec"]["suspend"]) == ("Job", "steersman-first-1", True)
    assert service.cluster.requests == []
    assert [job async for job in service.client.list_jobs()] == []
    # What is made is what was shown.
    await service.client.create_job("sft", {}, job_id="first", resources=JobResources(queue_name="research"))
    assert service.cluster.job("steersman-first-1")["spec"] == job["spec"]


async def test_a_job_waits_runs_is_preempted_and_succeeds(service: Fixture) -> None:
    await service.client.create_job("sft", {}, job_id="first")
    pod = service.cluster.add_pod("steersman-first-1", UNSCHEDULABLE)
    waiting = await service.until("first", lambda job: "Unschedulable" in job.progress.message)
    assert pod in waiting.progress.message
    assert waiting.state == "pending"

    service.cluster.set_pod(pod, {"phase": "Running"})
    service.begin("first")
    service.worker.append("first", [JobProgress(step=3, total_steps=9, message="training")])

    # The node is taken: the worker ends with a checkpoint, and Kubernetes makes another pod.
    service.worker.move("first", JobState.PENDING)
    service.cluster.set_pod(pod, {"phase": "Failed"})
    again = service.cluster.add_pod("steersman-first-1", UNSCHEDULABLE)
    waiting = await service.until("first", lambda job: again in job.progress.message)
    assert (waiting.state, waiting.progress.step) == ("pending", 3)
    service.cluster.set_pod(again, {"phase": "Running"})
    service.begin("first")
    service.worker.move("first", JobState.SUCCEEDED)
    service.cluster.set_condition("steersman-first-1", "Complete")
    ended = await service.until("first", lambda job: job.state == "succeeded")
    assert ended.num_attempts == 2
    assert service.cluster.count("patch") == 1


async def test_a_cancelled_job_has_time_for_its_checkpoint(service: Fixture) -> None:
    await service.client.create_job("sft", {}, job_id="first")
    pod = service.cluster.add_pod("steersman-first-1", {"phase": "Running"})
    service.begin("first")
    assert (await service.client.cancel_job("first")).state == "cancelling"
    assert [one["propagationPolicy"] for one in service.cluster.deletions] == ["Foreground"]
    service.worker.move("first", JobState.CANCELLED)
    service.cluster.end_pod(pod)
    assert service.cluster.jobs() == []
    # And resumed: a Job again.
    assert (await service.client.resume_job("first")).state == "pending"
    assert service.cluster.jobs() == ["steersman-first-1"]


async def test_a_refused_job_fails_with_what_to_do(service: Fixture) -> None:
    quota = 'jobs.batch "x" is forbidden: exceeded quota: team, requested: count/jobs.batch=1, used: 4, limited: 4'
    service.cluster.refuse("patch jobs", Refusal(403, quota))
    job = await service.client.create_job("sft", {}, job_id="first")
    assert job.state == "failed"
    for words in ("rl/steersman-first-1", "exceeded quota: team", "ask for less"):
        assert words in job.error


async def test_a_cluster_that_is_away_is_waited_for(service: Fixture) -> None:
    service.cluster.refuse("list jobs", Refusal(503, page=b"<html>upstream is away</html>"))
    job = await service.client.create_job("sft", {}, job_id="first")
    assert job.state == "pending"
    assert "cannot start a worker yet" in job.progress.message
    async with asyncio.timeout(30):
        while service.cluster.jobs() != ["steersman-first-1"]:
            await asyncio.sleep(0.02)


async def test_a_worker_that_died_fails_its_job_with_its_last_words(service: Fixture) -> None:
    await service.client.create_job("sft", {}, job_id="first")
    terminated = {"exitCode": 1, "reason": "Error", "message": "RuntimeError: no such data set"}
    state = {"phase": "Failed", "containerStatuses": [{"name": "worker", "state": {"terminated": terminated}}]}
    service.cluster.add_pod("steersman-first-1", state)
    service.cluster.set_condition("steersman-first-1", "Failed", reason="BackoffLimitExceeded")
    job = await service.until("first", lambda job: job.state == "failed")
    assert "RuntimeError: no such data set" in job.error


async def test_the_log_of_a_job_is_that_of_its_pods(service: Fixture) -> None:
    await service.client.create_job("sft", {}, job_id="first")
    assert [line async for line in service.client.job_logs("first")] == []
    pod = service.cluster.add_pod("steersman-first-1", {"phase": "Running"})
    service.begin("first")
    service.cluster.log(pod, "one", "two")
    assert [line async for line in service.client.job_logs("first")] == ["one", "two"]
    assert [line async for line in service.client.job_logs("first", tail_lines=1)] == ["two"]
    lines = service.client.job_logs("first", follow=True)
    assert [await anext(lines), await anext(lines)] == ["one", "two"]
    # The pod is replaced; its successor's lines follow.
    service.cluster.set_pod(pod, {"phase": "Failed"})
    again = service.cluster.add_pod("steersman-first-1", {"phase": "Running"})
    service.cluster.log(again, "three")
    assert await anext(lines) == "three"
    service.worker.move("first", JobState.SUCCEEDED)
    assert [line async for line in lines] == []
    service.cluster.refuse("get pods/log", Refusal(403, 'cannot get resource "pods/log" in API group ""'))
    with pytest.raises(SteersmanError, match=r"resources: \['pods/log'\], verbs: \['get'\]"):
        await anext(service.client.job_logs("first"))


async def test_the_next_service_goes_on_with_the_same_job(service: Fixture) -> None:
    await service.client.create_job("sft", {}, job_id="first")
    service.cluster.add_pod("steersman-first-1", {"phase": "Running"})
    service.begin("first")
    await service.stop()
    await service.start()
    service.worker.move("first", JobState.SUCCEEDED)
    await service.until("first", lambda job: job.state == "succeeded")
    assert service.cluster.jobs() == ["steersman-first-1"]


async def test_what_no_pod_can_have_is_refused(service: Fixture) -> None:
    with pytest.raises(SteersmanError) as caught:
        await service.client.create_job("sft", {}, resources=JobResources(num_processes=65, image="other:1"))
    assert caught.value.reason is Reason.INVALID_FIELD
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["spec.resources.processes_per_node", "spec.resources.image"]


async def test_the_database_needs_no_memory_shared_between_machines(service: Fixture) -> None:
    with sqlite3.connect(service.runs / DATABASE_FILE) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        (CLUSTER | {"run_mount_path": "/elsewhere"}, "kubernetes.run_mount_path is /elsewhere"),
        (CLUSTER, "no way to the Kubernetes API"),
    ],
)
def test_a_cluster_that_cannot_be_used_is_said_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: dict[str, Any], words: str
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    settings = TrainerSettings(runs_directory=tmp_path, launcher="kubernetes", kubernetes=cluster)
    with pytest.raises(ValueError, match=words):
        make_launcher(settings)


def test_a_cluster_must_be_described(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs its image and run_claim"):
        TrainerSettings(runs_directory=tmp_path, launcher="kubernetes")
