"""The launcher over real HTTP: what it makes, what it says of it, how it ends it, and what it makes of refusals."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import Refusal
from job_api_server import JobApiServer
from pod_cases import ENDINGS, PENDING

from steersman.cluster import api as cluster
from steersman.cluster.settings import KubernetesSettings
from steersman.trainer.jobs.folder import JobFile, write_job_file
from steersman.trainer.jobs.kubernetes.launcher import KubernetesLauncher
from steersman.trainer.jobs.launcher import LaunchRefused, WorkerStatus, process_handle
from steersman.trainer.jobs.model import JobKind, JobResources, JobSpec
from steersman.wire.errors import Reason, SteersmanError

SPEC = JobSpec(kind=JobKind.PPO, config={}, resources=JobResources(labels={"team": "a"}))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobApiServer]:
    with JobApiServer() as running:
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(running.kubeconfig()))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        # Read by the client when it was imported.
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        yield running


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "runs" / "ppo-1"
    directory.mkdir(parents=True)
    write_job_file(directory, JobFile(job_id="ppo-1", spec=SPEC, database="../jobs.sqlite"))
    return directory


@pytest.fixture
def launcher(server: JobApiServer) -> Iterator[KubernetesLauncher]:
    # Every look asks: no test waits.
    settings = KubernetesSettings(image="trainer:1", run_claim="runs", allowed_images=("mine/*:2",), poll_seconds=1e-9)
    api = cluster.connect(settings.namespace, settings.request_seconds)
    yield KubernetesLauncher(settings, api, user=1000, group=1000)
    api.close()


async def launch(launcher: KubernetesLauncher, run: Path) -> str:
    return await launcher.launch(run, SPEC.resources)


async def test_a_launch_makes_what_was_described(launcher: KubernetesLauncher, server: JobApiServer, run: Path) -> None:
    described = yaml.safe_load(await launcher.describe(run, SPEC))
    assert server.requests == []
    handle = await launch(launcher, run)
    made = server.job("steersman-ppo-1-1")
    assert handle == f"rl/steersman-ppo-1-1/{made['metadata']['uid']}"
    assert made["spec"] == described["spec"]
    assert described["metadata"].items() <= made["metadata"].items()


async def test_a_launch_that_was_not_recorded_is_found_again(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path
) -> None:
    handle = await launch(launcher, run)
    assert await launch(launcher, run) == handle
    assert server.count("patch") == 1


@pytest.mark.parametrize("over", ["Failed", "Complete", "deleted"])
async def test_the_next_attempt_is_a_job_of_its_own(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path, over: str
) -> None:
    first = await launch(launcher, run)
    server.add_pod("steersman-ppo-1-1", {"phase": "Running"})
    if over == "deleted":
        await launcher.stop(first)
    else:
        server.set_condition("steersman-ppo-1-1", over)
    second = await launch(launcher, run)
    assert second != first
    assert server.jobs() == ["steersman-ppo-1-1", "steersman-ppo-1-2"]


async def test_stop_ends_the_pod_in_peace_and_the_job_after_it(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path
) -> None:
    handle = await launch(launcher, run)
    pod = server.add_pod("steersman-ppo-1-1", {"phase": "Running"})
    assert (await launcher.status(handle)).waiting == ""
    await launcher.stop(handle)
    await launcher.stop(handle)
    (deletion,) = server.deletions
    assert deletion["propagationPolicy"] == "Foreground"
    assert "gracePeriodSeconds" not in deletion
    # It writes its checkpoint.
    assert (await launcher.status(handle)).alive
    server.end_pod(pod)
    status = await launcher.status(handle)
    assert not status.alive
    assert "steersman-ppo-1-1 was deleted" in status.ending
    await launcher.stop(handle)
    await launcher.kill(handle)


async def test_a_pod_that_ended_well_is_waited_for_by_nobody(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path
) -> None:
    handle = await launch(launcher, run)
    assert "has no pod yet" in (await launcher.status(handle)).waiting
    server.add_pod("steersman-ppo-1-1", {"phase": "Succeeded"})
    assert await launcher.status(handle) == WorkerStatus(alive=True)
    server.set_condition("steersman-ppo-1-1", "Complete")
    assert not (await launcher.status(handle)).alive


async def test_kill_ends_the_job_and_its_pods_at_once(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path
) -> None:
    handle = await launch(launcher, run)
    pod = server.add_pod("steersman-ppo-1-1", {"phase": "Running"})
    await launcher.stop(handle)
    await launcher.kill(handle)
    _, job, killed = server.deletions
    assert (job["resource"], job["propagationPolicy"]) == ("jobs", "Background")
    assert (killed["name"], killed["gracePeriodSeconds"]) == (pod, 1)
    assert not (await launcher.status(handle)).alive


async def test_a_later_job_of_the_same_name_is_another(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path
) -> None:
    handle = await launch(launcher, run)
    forged = handle.rpartition("/")[0] + "/another-uid"
    assert not (await launcher.status(forged)).alive
    await launcher.stop(forged)
    await launcher.kill(forged)
    assert server.jobs() == ["steersman-ppo-1-1"]
    assert (await launcher.status(handle)).alive


async def test_a_local_process_is_none_of_its_workers(launcher: KubernetesLauncher, server: JobApiServer) -> None:
    handle = process_handle(1)
    assert "another kind of launcher" in (await launcher.status(handle)).ending
    await launcher.stop(handle)
    assert server.requests == []


@pytest.mark.parametrize(("status", "words"), PENDING)
async def test_why_a_pod_does_not_run(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path, status: dict[str, Any], words: list[str]
) -> None:
    handle = await launch(launcher, run)
    pod = server.add_pod("steersman-ppo-1-1", status)
    seen = await launcher.status(handle)
    assert seen.alive
    for word in [pod, *words]:
        assert word in seen.waiting
    server.set_pod(pod, {"phase": "Running"})
    assert (await launcher.status(handle)).waiting == ""


async def test_a_pod_that_no_scheduler_has_seen(launcher: KubernetesLauncher, server: JobApiServer, run: Path) -> None:
    handle = await launch(launcher, run)
    pod = server.add_pod("steersman-ppo-1-1", {"phase": "Pending"})
    del server.objects["pods"][pod]["spec"]["nodeName"]
    assert "no node has been chosen" in (await launcher.status(handle)).waiting


async def test_a_volume_that_is_not_there_is_told_by_the_events_of_the_pod(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path
) -> None:
    handle = await launch(launcher, run)
    pod = server.add_pod("steersman-ppo-1-1", {"phase": "Pending", "containerStatuses": None})
    assert "its node prepares it" in (await launcher.status(handle)).waiting
    server.add_event(
        server.objects["pods"][pod]["metadata"]["uid"], "FailedMount", 'persistentvolumeclaim "runs" not found'
    )
    waiting = (await launcher.status(handle)).waiting
    assert 'persistentvolumeclaim "runs" not found' in waiting
    assert "kubernetes.run_claim" in waiting


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ('pods "x" is forbidden: exceeded quota: team, requested: limits.cpu=4, used: limits.cpu=8', "ResourceQuota"),
        (
            'pods "x" is forbidden: error looking up service account rl/t: serviceaccount "t" not found',
            "service_account",
        ),
        ('pods "x" is forbidden: violates PodSecurity "restricted:latest"', "admission policy"),
        ('pods "x" is forbidden: no PriorityClass with name high was found', "kubernetes.priority_class"),
        ('Pod "x" is invalid: spec.containers[0].image: Invalid value: " a"', "the message names its field"),
    ],
)
async def test_why_a_job_has_no_pod(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path, message: str, advice: str
) -> None:
    handle = await launch(launcher, run)
    server.add_event(handle.rpartition("/")[2], "FailedCreate", f"Error creating: {message}")
    waiting = (await launcher.status(handle)).waiting
    assert message.replace('pods "x"', "its pod") in waiting
    assert advice in waiting


async def test_a_job_in_a_queue_waits_for_kueue(launcher: KubernetesLauncher, server: JobApiServer, run: Path) -> None:
    spec = JobSpec(kind=JobKind.PPO, config={}, resources=JobResources(queue_name="research"))
    write_job_file(run, JobFile(job_id="ppo-1", spec=spec, database="../jobs.sqlite"))
    handle = await launch(launcher, run)
    server.set_condition("steersman-ppo-1-1", "Suspended", message="Job suspended")
    assert "Kueue to admit it from queue research" in (await launcher.status(handle)).waiting


async def test_a_preempted_pod_is_no_end(launcher: KubernetesLauncher, server: JobApiServer, run: Path) -> None:
    handle = await launch(launcher, run)
    first = server.add_pod("steersman-ppo-1-1", {"phase": "Running"})
    server.objects["pods"][first]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert "goes on from the last checkpoint" in (await launcher.status(handle)).waiting
    terminated = {"terminated": {"exitCode": 143, "reason": "Error"}}
    server.set_pod(first, {"phase": "Failed", "containerStatuses": [{"name": "worker", "state": terminated}]})
    assert (await launcher.status(handle)).alive
    server.add_pod("steersman-ppo-1-1", {"phase": "Running"})
    status = await launcher.status(handle)
    assert status.alive
    assert status.waiting == ""


@pytest.mark.parametrize(("terminated", "words"), ENDINGS)
async def test_how_a_worker_ended(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path, terminated: dict[str, Any], words: list[str]
) -> None:
    handle = await launch(launcher, run)
    state = [{"name": "worker", "state": {"terminated": terminated}}]
    server.add_pod("steersman-ppo-1-1", {"phase": "Failed", "containerStatuses": state})
    # The pod has failed; the Job controller has yet to say that this was the end.
    assert (await launcher.status(handle)).alive
    server.set_condition("steersman-ppo-1-1", "Failed", reason="BackoffLimitExceeded", message="limit")
    status = await launcher.status(handle)
    assert not status.alive
    for word in words:
        assert word in status.ending


REFUSALS = [
    ("patch jobs", 401, "Unauthorized", ["jobs.batch rl/steersman-ppo-1-1", "token"]),
    (
        "list jobs",
        403,
        'jobs.batch is forbidden: User "system:serviceaccount:rl:trainer" cannot list resource "jobs" in API group '
        '"batch" in the namespace "rl"',
        ["system:serviceaccount:rl:trainer", "apiGroups: ['batch'], resources: ['jobs'], verbs: ['list']"],
    ),
    (
        "patch jobs",
        403,
        'jobs.batch "steersman-ppo-1-1" is forbidden: User "x" cannot create resource "jobs" in API group "batch"',
        ["verbs: ['create']"],
    ),
    (
        "patch jobs",
        403,
        'jobs.batch "steersman-ppo-1-1" is forbidden: exceeded quota: team, requested: count/jobs.batch=1',
        ["exceeded quota: team", "ResourceQuota raised"],
    ),
    ("patch jobs", 404, 'namespaces "rl" not found', ["create the namespace rl", "kubernetes.namespace"]),
    (
        "patch jobs",
        422,
        'spec.template.spec.priorityClassName: Invalid value: "x"',
        ["priorityClassName", "names its field"],
    ),
    (
        "patch jobs",
        422,
        "jobs.batch \"x\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'p' denied request: not today",
        ["not today", "an admission policy"],
    ),
]


@pytest.mark.parametrize(("what", "code", "message", "words"), REFUSALS)
async def test_a_refusal_for_good_says_what_to_do(
    launcher: KubernetesLauncher,
    server: JobApiServer,
    run: Path,
    what: str,
    code: int,
    message: str,
    words: list[str],
) -> None:
    server.refuse(what, Refusal(code, message))
    with pytest.raises(LaunchRefused) as caught:
        await launch(launcher, run)
    assert caught.value.strerror is not None
    for word in words:
        assert word in caught.value.strerror


async def test_what_someone_else_made_is_not_taken(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path
) -> None:
    metadata = {"name": "steersman-ppo-1-1", "namespace": "rl", "uid": "theirs", "managedFields": [{"manager": "them"}]}
    server.objects["jobs"]["steersman-ppo-1-1"] = {"metadata": metadata, "spec": {}}
    with pytest.raises(LaunchRefused, match=r'conflicts with "kubectl-create".*delete it, and resume the job'):
        await launch(launcher, run)


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(429, "too many requests", {"Retry-After": "7"}),
        Refusal(503, page=b"<html>upstream is away</html>"),
        Refusal(500, "etcdserver: request timed out"),
    ],
)
async def test_a_busy_server_is_left_in_peace_and_asked_again(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path, refusal: Refusal
) -> None:
    server.refuse("patch jobs", refusal)
    for _ in range(2):
        with pytest.raises(SteersmanError) as caught:
            await launch(launcher, run)
        assert caught.value.reason is Reason.ENGINE_UNAVAILABLE
    assert server.count("patch") == 1
    launcher._pause._until = 0.0
    assert (await launch(launcher, run)).startswith("rl/steersman-ppo-1-1/")


async def test_a_server_that_is_away_changes_nothing_about_a_worker(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handle = await launch(launcher, run)
    server.add_pod("steersman-ppo-1-1", {"phase": "Running"})
    assert (await launcher.status(handle)).waiting == ""
    for code in (503, 403):
        server.refuse("get jobs", Refusal(code, 'cannot get resource "jobs" in API group "batch"'))
        status = await launcher.status(handle)
        assert status.alive
        assert status.waiting == ""
        launcher._pause._until = 0.0
    assert ["verbs: ['get']" in line for line in caplog.messages] == [False, True]


async def test_rights_that_only_explain_may_be_missing(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path
) -> None:
    handle = await launch(launcher, run)
    server.refuse("list events", Refusal(403, 'cannot list resource "events" in API group ""'))
    waiting = (await launcher.status(handle)).waiting
    assert "resources: ['events'], verbs: ['list']" in waiting


async def test_no_server_at_all(server: JobApiServer, run: Path) -> None:
    settings = KubernetesSettings(image="trainer:1", run_claim="runs")
    api = cluster.connect("rl", 5.0)
    server._server.socket.close()
    with pytest.raises(SteersmanError, match="does not answer") as caught:
        await KubernetesLauncher(settings, api, user=1, group=1).launch(run, SPEC.resources)
    assert "NetworkPolicy" in caught.value.message


@pytest.mark.parametrize(
    ("resources", "field"),
    [
        (JobResources(num_processes=-1), "spec.resources.num_processes"),
        (JobResources(num_processes=65), "spec.resources.processes_per_node"),
        (JobResources(num_processes=8, processes_per_node=3), "spec.resources.processes_per_node"),
        (JobResources(num_processes=64000, processes_per_node=32), "spec.resources.processes_per_node"),
        (JobResources(gpus_per_process=2), "spec.resources.gpus_per_process"),
        (JobResources(cpus_per_process=float("nan")), "spec.resources.cpus_per_process"),
        (JobResources(memory_bytes_per_process=-1), "spec.resources.memory_bytes_per_process"),
        (JobResources(queue_name="no queue"), "spec.resources.queue_name"),
        (JobResources(image="theirs/x:2"), "spec.resources.image"),
        (JobResources(labels={"steersman/job-id": "x"}), "spec.resources.labels[steersman/job-id]"),
        (JobResources(labels={"a": "b c"}), "spec.resources.labels[a]"),
    ],
)
def test_what_a_job_cannot_have_is_named(launcher: KubernetesLauncher, resources: JobResources, field: str) -> None:
    assert [violation.field for violation in launcher.check(resources)] == [field]


def test_what_a_job_can_have(launcher: KubernetesLauncher) -> None:
    resources = JobResources(
        num_processes=1, gpus_per_process=1, image="mine/trainer:2", queue_name="q", labels={"a": "b"}
    )
    assert launcher.check(resources) == []


def several_nodes(run: Path) -> JobResources:
    resources = JobResources(num_processes=4, processes_per_node=2)
    spec = JobSpec(kind=JobKind.PPO, config={}, resources=resources)
    write_job_file(run, JobFile(job_id="ppo-1", spec=spec, database="../jobs.sqlite"))
    return resources


async def test_a_service_that_was_not_made_is_made_by_the_next_launch(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path
) -> None:
    resources = several_nodes(run)
    server.refuse("patch services", Refusal(500, "etcd is away"))
    with pytest.raises(SteersmanError) as caught:
        await launcher.launch(run, resources)
    assert caught.value.reason is Reason.ENGINE_UNAVAILABLE
    launcher._pause._until = 0.0
    handle = await launcher.launch(run, resources)
    assert (server.jobs(), list(server.objects["services"])) == (["steersman-ppo-1-1"], ["steersman-ppo-1-1"])
    # And goes with the Job.
    await launcher.stop(handle)
    assert server.objects["services"] == {}


async def test_a_service_that_is_refused_takes_its_job_back(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path
) -> None:
    server.refuse("patch services", Refusal(403, "exceeded quota: team, requested: count/services=1"))
    with pytest.raises(LaunchRefused, match="cannot patch services rl/steersman-ppo-1-1: .* ResourceQuota raised"):
        await launcher.launch(run, several_nodes(run))
    assert server.jobs() == []


async def test_a_node_that_waits_is_told_before_those_that_run(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path
) -> None:
    handle = await launcher.launch(run, several_nodes(run))
    server.add_pod("steersman-ppo-1-1", {"phase": "Running"}, index=0)
    lost = server.add_pod("steersman-ppo-1-1", {"phase": "Failed", "reason": "Preempted"}, index=1)
    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    pod = server.add_pod("steersman-ppo-1-1", {"phase": "Pending", "conditions": [unschedulable]}, index=1)
    waiting = (await launcher.status(handle)).waiting
    assert pod in waiting
    assert lost not in waiting
    server.set_pod(pod, {"phase": "Running"})
    assert await launcher.status(handle) == WorkerStatus(alive=True)


async def test_the_node_that_failed_is_blamed_not_those_that_followed(
    launcher: KubernetesLauncher, server: JobApiServer, run: Path
) -> None:
    handle = await launcher.launch(run, several_nodes(run))

    def ended(code: int, message: str) -> dict[str, Any]:
        terminated = {"exitCode": code, "reason": "Error", "message": message}
        return {"phase": "Failed", "containerStatuses": [{"name": "worker", "state": {"terminated": terminated}}]}

    first = server.add_pod("steersman-ppo-1-1", ended(1, "CUDA error: an illegal memory access"), index=0)
    server.add_pod("steersman-ppo-1-1", ended(143, "node 0 failed first"), index=1)
    server.set_condition("steersman-ppo-1-1", "Failed", reason="BackoffLimitExceeded")
    status = await launcher.status(handle)
    assert f"exited with status 1 in pod {first}" in status.ending
    assert "illegal memory access" in status.ending


async def test_a_jobset_from_launch_to_end(server: JobApiServer, run: Path) -> None:
    settings = KubernetesSettings(image="trainer:1", run_claim="runs", jobset=True, poll_seconds=1e-9)
    api = cluster.connect(None, 5.0)
    launcher = KubernetesLauncher(settings, api, user=1000, group=1000)
    handle = await launcher.launch(run, several_nodes(run))
    uid = server.objects["jobsets"]["steersman-ppo-1-1"]["metadata"]["uid"]
    assert handle == f"rl/jobsets/steersman-ppo-1-1/{uid}"
    assert await launcher.launch(run, several_nodes(run)) == handle
    assert "JobSet steersman-ppo-1-1 has no pod yet" in (await launcher.status(handle)).waiting
    pod = server.add_pod("steersman-ppo-1-1", {"phase": "Running"}, index=0)
    assert await launcher.status(handle) == WorkerStatus(alive=True)
    server.set_condition("steersman-ppo-1-1", "Failed", reason="FailedJobs", message="jobset failed")
    assert not (await launcher.status(handle)).alive
    await launcher.kill(handle)
    assert server.objects["jobsets"] == {}
    assert [one["resource"] for one in server.deletions] == ["jobsets", "pods"]
    assert pod in [one["name"] for one in server.deletions]
    assert "its JobSet rl/steersman-ppo-1-1 was deleted" in (await launcher.status(handle)).ending
    api.close()
