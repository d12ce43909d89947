"""What a real API server and its controllers refuse, and what the launcher makes of it."""

import re
from typing import Any

import pytest
import yaml
from control_plane import ControlPlane, Object, Refused, eventually, path_of
from launching import ONE, SEVERAL, Make, Runs, launch, waiting_for
from nodes import Nodes

from steersman.cluster import api as cluster
from steersman.cluster.objects import handle_of
from steersman.cluster.settings import KubernetesSettings
from steersman.trainer.jobs.kubernetes.launcher import KubernetesLauncher
from steersman.trainer.jobs.launcher import LaunchRefused
from steersman.trainer.jobs.model import JobKind, JobResources, JobSpec


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
        accounts.wait_for_right(namespace, "stranger", group, resource, verb)

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
                accounts.wait_for_right(namespace, "stranger", "batch", "jobs", "delete")
    # Events are asked for of a pod that is placed and does not run.
    nodes.bind(nodes.pod_of(ONE))
    while RULE.search(waiting := (await launcher.status(handle)).waiting):
        give(waiting)
    named = {("batch", "jobs", verb) for verb in ("get", "list", "create", "patch", "delete")}
    named |= {("", "services", "create"), ("", "services", "patch"), ("", "pods", "list"), ("", "events", "list")}
    assert set(given) == named


async def test_a_namespace_that_is_gone(
    launcher: KubernetesLauncher, accounts: ControlPlane, run_of: Runs, namespace: str
) -> None:
    """Its accounts go with it: the token is not valid any more. An administrator is told what is not there."""
    accounts.admin.ask("DELETE", f"/api/v1/namespaces/{namespace}")
    eventually(lambda: accounts.admin.get(f"/api/v1/namespaces/{namespace}") is None, "the namespace is gone")
    with pytest.raises(LaunchRefused, match="401: Unauthorized.*check the ServiceAccount"):
        await launch(launcher, run_of())
    administrator = cluster.Cluster(accounts.client(), namespace=namespace, request_seconds=20.0)
    settings = KubernetesSettings(image="trainer:1", run_claim="runs")
    with pytest.raises(LaunchRefused, match=rf'namespaces "{namespace}" not found; create the namespace {namespace}'):
        await launch(KubernetesLauncher(settings, administrator, user=1000, group=1000), run_of())
    administrator.close()
