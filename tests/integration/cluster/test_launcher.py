"""The launcher with the token and the Role of the trainer service, against a real API server and its controllers."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from control_plane import ControlPlane, Object, Refused, eventually, path_of
from kubernetes.utils.quantity import parse_quantity
from nodes import Nodes
from pod_cases import ENDINGS, PENDING

from steersman.cluster import api as cluster
from steersman.cluster.objects import handle_of
from steersman.cluster.settings import KubernetesSettings
from steersman.trainer.jobs.folder import JobFile, write_job_file
from steersman.trainer.jobs.kubernetes.launcher import KubernetesLauncher
from steersman.trainer.jobs.launcher import LaunchRefused, LogPart, WorkerStatus
from steersman.trainer.jobs.model import JobKind, JobResources, JobSpec

ONE, TWO = "steersman-one-1", "steersman-one-2"
SEVERAL = JobResources(num_processes=4, processes_per_node=2)
# Every look asks: no test waits for the next.
SETTINGS: dict[str, Any] = {"image": "trainer:1", "run_claim": "runs", "poll_seconds": 1e-9}

Make = Callable[..., KubernetesLauncher]
Runs = Callable[..., Path]


@pytest.fixture
def make_launcher(accounts: ControlPlane, sign_in: Callable[[str], None]) -> Iterator[Make]:
    """A launcher of the trainer service with these settings."""
    clients = []

    def make(account: str = "trainer", **settings: Any) -> KubernetesLauncher:
        sign_in(account)
        clients.append(cluster.connect(None, 20.0))
        return KubernetesLauncher(KubernetesSettings(**SETTINGS | settings), clients[-1], user=1000, group=1000)

    yield make
    for one in clients:
        one.close()


@pytest.fixture
def launcher(make_launcher: Make) -> KubernetesLauncher:
    return make_launcher()


@pytest.fixture
def run_of(tmp_path: Path) -> Runs:
    """The folder of a job."""

    def make(job_id: str = "one", resources: JobResources | None = None) -> Path:
        directory = tmp_path / "runs" / job_id
        directory.mkdir(parents=True, exist_ok=True)
        spec = JobSpec(kind=JobKind.PPO, config={}, resources=resources or JobResources(labels={"team": "a"}))
        write_job_file(directory, JobFile(job_id=job_id, spec=spec, database="../jobs.sqlite"))
        return directory

    return make


async def launch(launcher: KubernetesLauncher, run: Path) -> str:
    return await launcher.launch(run, JobResources())


async def until(launcher: KubernetesLauncher, handle: str, wanted: Callable[[WorkerStatus], bool]) -> WorkerStatus:
    """What the launcher says once it says what is wanted."""
    import asyncio

    async with asyncio.timeout(120):
        while not wanted(status := await launcher.status(handle)):
            await asyncio.sleep(0.05)
    return status


async def waiting_for(launcher: KubernetesLauncher, handle: str, text: str) -> str:
    """Why a worker waits, once that holds a text."""
    status = await until(launcher, handle, lambda now: text in now.waiting or not now.alive)
    assert status.alive, status.ending
    return status.waiting


def assert_holds(made: Any, asked: Any, at: str = "") -> None:
    """What was asked for is in what was made, beside what the API server adds."""
    match asked:
        case dict():
            for key, value in asked.items():
                assert_holds(made[key], value, f"{at}.{key}")
        case list():
            assert len(made) == len(asked), at
            for index, (one, other) in enumerate(zip(made, asked, strict=True)):
                assert_holds(one, other, f"{at}[{index}]")
        case str() if re.search(r"\.(limits|requests)\.|sizeLimit", at):
            assert parse_quantity(made) == parse_quantity(asked), at
        case _:
            assert made == asked, at


async def test_a_launch_makes_what_was_described(
    launcher: KubernetesLauncher, accounts: ControlPlane, nodes: Nodes, run_of: Runs, namespace: str
) -> None:
    run = run_of()
    spec = JobSpec(kind=JobKind.PPO, config={}, resources=JobResources(labels={"team": "a"}))
    described = yaml.safe_load(await launcher.describe(run, spec))
    handle = await launch(launcher, run)
    made = accounts.admin.ask("GET", path_of("Job", namespace, ONE))
    assert handle == handle_of(namespace, ONE, made["metadata"]["uid"], jobset=False)
    assert_holds(made, described)
    pod = nodes.pod(nodes.pod_of(ONE))
    assert_holds(pod["spec"], described["spec"]["template"]["spec"])
    assert pod["metadata"]["labels"]["batch.kubernetes.io/controller-uid"] == made["metadata"]["uid"]


async def test_a_launch_that_was_not_recorded_is_found_again(
    launcher: KubernetesLauncher, accounts: ControlPlane, run_of: Runs, namespace: str
) -> None:
    handle = await launch(launcher, run_of())
    assert await launch(launcher, run_of()) == handle
    jobs = accounts.admin.ask("GET", path_of("Job", namespace))["items"]
    assert [one["metadata"]["name"] for one in jobs] == [ONE]


async def test_why_a_pod_does_not_run(launcher: KubernetesLauncher, nodes: Nodes, run_of: Runs) -> None:
    handle = await launch(launcher, run_of())
    pod = nodes.pod_of(ONE)
    assert "no node has been chosen" in await waiting_for(launcher, handle, pod)
    # Nothing has printed yet, says the API server.
    assert (await launcher.read_log(handle, run_of(), LogPart())).lines == []
    nodes.bind(pod)
    assert "its node prepares it" in (await launcher.status(handle)).waiting
    for status, words in PENDING:
        nodes.say(pod, status)
        waiting = (await launcher.status(handle)).waiting
        for word in [pod, *words]:
            assert word in waiting
    nodes.say(pod, {"phase": "Running"})
    assert await launcher.status(handle) == WorkerStatus(alive=True)


async def test_how_workers_end(launcher: KubernetesLauncher, nodes: Nodes, run_of: Runs) -> None:
    cases = [({"exitCode": 0, "reason": "Completed"}, ["ended well"]), *ENDINGS]
    handles = [await launch(launcher, run_of(f"job{number}")) for number in range(len(cases))]
    for number, (terminated, _) in enumerate(cases):
        pod = nodes.pod_of(f"steersman-job{number}-1")
        nodes.run(pod)
        nodes.finish(pod, terminated)
    for handle, (_, words) in zip(handles, cases, strict=True):
        status = await until(launcher, handle, lambda now: not now.alive)
        for word in words:
            assert word in status.ending
    # What comes after the end is a Job of its own.
    again = await launch(launcher, run_of("job0"))
    assert again.split("/")[1] == "steersman-job0-2"


async def test_a_pod_that_was_put_out_has_a_successor(launcher: KubernetesLauncher, nodes: Nodes, run_of: Runs) -> None:
    handles = [await launch(launcher, run_of(name)) for name in ("told-to-end", "taken-away")]
    names = [handle.split("/")[1] for handle in handles]
    first = [nodes.pod_of(name) for name in names]
    for pod in first:
        nodes.run(pod)
    nodes.finish(first[0], {"exitCode": 143, "reason": "Error"})
    disruption = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
    nodes.finish(first[1], {"exitCode": 137, "reason": "Error"}, conditions=(disruption,))
    for handle, name, pod in zip(handles, names, first, strict=True):
        second = nodes.pod_of(name, but=pod)
        assert second in (await launcher.status(handle)).waiting
        nodes.run(second)
        assert await launcher.status(handle) == WorkerStatus(alive=True)


async def test_stop_ends_the_pod_in_peace_and_the_job_after_it(
    launcher: KubernetesLauncher, accounts: ControlPlane, nodes: Nodes, run_of: Runs, namespace: str
) -> None:
    handle = await launch(launcher, run_of())
    pod = nodes.pod_of(ONE)
    nodes.run(pod)
    await launcher.stop(handle)
    await launcher.stop(handle)
    eventually(lambda: nodes.pod(pod)["metadata"].get("deletionTimestamp"), "the pod is told to end")
    assert nodes.pod(pod)["metadata"]["deletionGracePeriodSeconds"] == 120
    # It writes its checkpoint.
    assert (await launcher.status(handle)).alive
    # A job that is told to end counts as over for the next launch.
    assert (await launch(launcher, run_of())).split("/")[1] == TWO
    nodes.end(pod)
    status = await until(launcher, handle, lambda now: not now.alive)
    assert f"{ONE} was deleted" in status.ending
    await launcher.stop(handle)
    await launcher.kill(handle)


async def test_kill_ends_the_job_and_its_pods_at_once(launcher: KubernetesLauncher, nodes: Nodes, run_of: Runs) -> None:
    handle = await launch(launcher, run_of())
    pod = nodes.pod_of(ONE)
    nodes.run(pod)
    await launcher.stop(handle)
    await launcher.kill(handle)
    eventually(lambda: nodes.pod(pod)["metadata"].get("deletionGracePeriodSeconds") == 1, "the grace is cut short")
    nodes.end(pod)
    status = await until(launcher, handle, lambda now: not now.alive)
    assert f"{ONE} was deleted" in status.ending


async def test_a_later_job_of_the_same_name_is_another(
    launcher: KubernetesLauncher, accounts: ControlPlane, run_of: Runs, namespace: str
) -> None:
    handle = await launch(launcher, run_of())
    forged = f"{handle.rpartition('/')[0]}/another-uid"
    assert not (await launcher.status(forged)).alive
    await launcher.stop(forged)
    await launcher.kill(forged)
    held = accounts.admin.ask("GET", path_of("Job", namespace, ONE))
    assert "deletionTimestamp" not in held["metadata"]
    assert (await launcher.status(handle)).alive


async def test_what_someone_else_made_is_not_taken(
    launcher: KubernetesLauncher, accounts: ControlPlane, run_of: Runs, namespace: str
) -> None:
    spec = JobSpec(kind=JobKind.PPO, config={}, resources=JobResources())
    theirs = yaml.safe_load(await launcher.describe(run_of(), spec))
    # Without any it would get those of its pods.
    theirs["metadata"]["labels"] = {"made-by": "hand"}
    theirs["spec"]["backoffLimit"] = 3
    accounts.make(namespace, theirs)
    with pytest.raises(LaunchRefused, match=r"onflict.*backoffLimit.*delete it, and resume the job"):
        await launch(launcher, run_of())


def quota(**hard: str) -> Object:
    return {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team"}, "spec": {"hard": hard}}


def is_counted(plane: ControlPlane, namespace: str) -> bool:
    held = plane.admin.ask("GET", path_of("ResourceQuota", namespace, "team"))
    return bool(held.get("status", {}).get("used"))


@pytest.mark.parametrize("hard", ["jobs", "processors"])
async def test_a_quota_that_is_exceeded(
    launcher: KubernetesLauncher, accounts: ControlPlane, run_of: Runs, namespace: str, hard: str
) -> None:
    accounts.make(namespace, quota(**({"count/jobs.batch": "0"} if hard == "jobs" else {"limits.cpu": "500m"})))
    eventually(lambda: is_counted(accounts, namespace), "the quota is counted")
    if hard == "jobs":
        with pytest.raises(LaunchRefused, match=r"exceeded quota: team.*ResourceQuota raised"):
            await launch(launcher, run_of())
        return
    handle = await launch(launcher, run_of())
    waiting = await waiting_for(launcher, handle, "exceeded quota: team")
    assert "ResourceQuota raised" in waiting


@pytest.mark.parametrize(
    ("settings", "message", "advice"),
    [
        ({"priority_class": "no-such"}, "no PriorityClass with name no-such", "kubernetes.priority_class"),
        ({"service_account": "no-such"}, 'serviceaccount "no-such" not found', "kubernetes.service_account"),
        # Of a Job's template the API server does not say so.
        ({"image": " trainer:1"}, "spec.containers[0].image: Invalid value", "the message names its field"),
    ],
    ids=["priority class", "service account", "image"],
)
async def test_why_a_job_has_no_pod(
    make_launcher: Make, run_of: Runs, settings: dict[str, str], message: str, advice: str
) -> None:
    launcher = make_launcher(**settings)
    handle = await launch(launcher, run_of())
    waiting = await waiting_for(launcher, handle, message)
    assert advice in waiting


async def test_a_limit_range_is_told_in_its_own_words(
    launcher: KubernetesLauncher, accounts: ControlPlane, run_of: Runs, namespace: str
) -> None:
    limits = [{"type": "Container", "max": {"memory": "1Gi"}}]
    body = {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small"}, "spec": {"limits": limits}}
    accounts.make(namespace, body)
    handle = await launch(launcher, run_of())
    assert "admission policy" in await waiting_for(launcher, handle, "maximum memory usage per Container is 1Gi")


async def test_a_pod_that_pod_security_refuses(
    launcher: KubernetesLauncher, accounts: ControlPlane, run_of: Runs, namespace: str
) -> None:
    # Pods of jobs are none such; a webhook may have changed them.
    spec = JobSpec(kind=JobKind.PPO, config={}, resources=JobResources())
    job = yaml.safe_load(await launcher.describe(run_of(), spec))
    job["spec"]["template"]["spec"]["hostNetwork"] = True
    accounts.make(namespace, job)
    uid = accounts.admin.ask("GET", path_of("Job", namespace, ONE))["metadata"]["uid"]
    handle = handle_of(namespace, ONE, uid, jobset=False)
    waiting = await waiting_for(launcher, handle, 'violates PodSecurity "restricted:latest": host namespaces')
    assert "admission policy" in waiting


async def test_a_policy_that_refuses_jobs_is_told_in_its_own_words(
    launcher: KubernetesLauncher, accounts: ControlPlane, run_of: Runs, namespace: str
) -> None:
    rule = {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
    words = "no jobs on Saturdays"
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": namespace},
        "spec": {
            "matchConstraints": {
                "resourceRules": [rule],
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
            },
            "validations": [{"expression": "false", "message": words}],
        },
    }
    binding = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": namespace},
        "spec": {"policyName": namespace, "validationActions": ["Deny"]},
    }
    accounts.make(namespace, policy, binding)
    probe = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "probe"}}
    container = {"name": "one", "image": "one"}
    probe |= {"spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}}}

    def refuses() -> bool:
        try:
            accounts.admin.ask("POST", f"{path_of('Job', namespace)}?dryRun=All", probe)
        except Refused as refused:
            return words in str(refused)
        return False

    eventually(refuses, "the policy is heeded")
    with pytest.raises(LaunchRefused, match=rf"{words}.*admission policy of the cluster refuses it"):
        await launch(launcher, run_of())


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"gpu_resource": "no resource", "extra_resources": {"also none": "1"}}, "also none"),
        ({"node_selector": {"a": "not a label!"}}, "nodeSelector"),
    ],
    ids=["resource", "node selector"],
)
async def test_settings_that_the_api_server_refuses_are_named(
    make_launcher: Make, run_of: Runs, settings: dict[str, Any], field: str
) -> None:
    with pytest.raises(LaunchRefused) as caught:
        await launch(make_launcher(**settings), run_of())
    assert field in str(caught.value)
    assert "the message names its field" in str(caught.value)


RULE = re.compile(r"apiGroups: \['(.*?)'\], resources: \['(.*?)'\], verbs: \['(.*?)'\]")


async def test_the_rights_that_it_says_are_missing_are_those_it_needs(
    make_launcher: Make, accounts: ControlPlane, nodes: Nodes, run_of: Runs, namespace: str
) -> None:
    """From none to all, each given as the message says."""
    stranger = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "stranger"}}
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "given"}, "rules": []}
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "given"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "given"},
        "subjects": [{"kind": "ServiceAccount", "name": "stranger", "namespace": namespace}],
    }
    accounts.make(namespace, stranger, role, binding)
    given: list[tuple[str, str, str]] = []

    def give(message: str) -> None:
        found = RULE.search(message)
        assert found is not None, message
        group, resource, verb = right = found.group(1), found.group(2), found.group(3)
        assert right not in given
        given.append(right)
        rule = {"apiGroups": [group], "resources": [resource], "verbs": [verb]}
        role["rules"].append(rule)
        accounts.admin.merge(path_of("Role", namespace, "given"), {"rules": role["rules"]})
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {
                "user": f"system:serviceaccount:{namespace}:stranger",
                "resourceAttributes": {
                    "namespace": namespace,
                    "group": group,
                    "resource": resource.partition("/")[0],
                    "subresource": resource.partition("/")[2],
                    "verb": verb,
                },
            },
        }
        path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
        eventually(lambda: accounts.admin.ask("POST", path, review)["status"]["allowed"], f"{right} counts")

    launcher = make_launcher("stranger")
    run = run_of(resources=SEVERAL)
    handle = ""
    while not handle:
        try:
            handle = await launcher.launch(run, SEVERAL)
        except LaunchRefused as refused:
            give(str(refused))
            # Without the Service there is no Job.
            jobs = accounts.admin.ask("GET", path_of("Job", namespace))["items"]
            if not any(right[2] == "delete" for right in given) and jobs:
                given.append(("batch", "jobs", "delete"))
                role["rules"].append({"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["delete"]})
                accounts.admin.merge(path_of("Role", namespace, "given"), {"rules": role["rules"]})
    # Events are asked for of a pod that is placed and does not run.
    nodes.bind(nodes.pod_of(ONE))
    while RULE.search(waiting := (await launcher.status(handle)).waiting):
        give(waiting)
    named = {("batch", "jobs", verb) for verb in ("get", "list", "create", "patch", "delete")}
    named |= {("", "services", "create"), ("", "services", "patch"), ("", "pods", "list"), ("", "events", "list")}
    assert set(given) == named
