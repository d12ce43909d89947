"""`steersman ... --on kubernetes` with the rights of the ClusterRole `edit`, as far as it goes without a kubelet."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from control_plane import ControlPlane, Object, eventually, path_of
from launching import SignIn, assert_holds
from nodes import Nodes
from typer.testing import CliRunner, Result

from steersman.cli import cluster_watch
from steersman.cli.main import app

CLUSTER = {"image": "trainer:1", "run_claim": "runs"}
PPO = {"model": {"path": "/models/policy"}, "data": {"files": ["/data/prompts.jsonl"]}}
FIRST, SECOND = "steersman-mine-1", "steersman-mine-2"

Steersman = Callable[..., Result]


@pytest.fixture
def steersman(
    accounts: ControlPlane, namespace: str, sign_in: SignIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Steersman:
    """The command, for somebody who may edit the namespace."""
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "someone"}}
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "someone"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"},
        "subjects": [{"kind": "ServiceAccount", "name": "someone", "namespace": namespace}],
    }
    accounts.make(namespace, account, binding)
    # The ClusterRole is made of others.
    accounts.wait_for_right(namespace, "someone", "batch", "jobs", "create")
    accounts.wait_for_right(namespace, "someone", "", "pods/log", "get")
    sign_in("someone")
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(PPO))
    monkeypatch.setenv("STEERSMAN_ON", "kubernetes")
    monkeypatch.setenv("STEERSMAN_CLUSTER", str(tmp_path / "cluster.yaml"))
    monkeypatch.setattr(cluster_watch, "POLL_SECONDS", 0.05)
    # Settings are checked by a process of their own, which is another test's.
    monkeypatch.setattr("steersman.cli.cluster.check_settings", lambda kind, config: True)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, arguments)

    return run


@pytest.fixture
def train(steersman: Steersman, tmp_path: Path) -> Steersman:
    def run(*arguments: str) -> Result:
        return steersman("train", "ppo", str(tmp_path / "ppo.yaml"), "--job-id", "mine", *arguments)

    return run


def shown(steersman: Steersman) -> Object:
    done = steersman("jobs", "get", "mine")
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def reaches(steersman: Steersman, state: str) -> None:
    eventually(lambda: shown(steersman)["state"] == state, f"the job is {state}")


def test_what_a_dry_run_prints_is_taken_and_is_what_is_made(
    train: Steersman, accounts: ControlPlane, namespace: str
) -> None:
    asked = ("--nodes", "2", "--gpus", "4", "--cpus", "32", "--memory-gib", "64")
    dry = train("--dry-run", *asked)
    assert dry.exit_code == 0, dry.output
    things = list(yaml.safe_load_all(dry.stdout))
    tried = accounts.kubectl(
        "apply", "--dry-run=server", "--validate=strict", "--warnings-as-errors", "-f", "-", documents=things
    )
    assert tried.returncode == 0, tried.stderr
    made = train("--no-follow", *asked)
    assert (made.exit_code, made.stdout) == (0, "mine\n"), made.output
    for thing in things:
        held = accounts.admin.ask("GET", path_of(thing["kind"], namespace, FIRST))
        assert_holds(held["spec"], thing["spec"])
    again = train("--no-follow", *asked)
    assert again.exit_code == 1
    assert f"job 'mine' is pending in {namespace}; it runs" in again.stderr


def test_from_launch_to_success(train: Steersman, steersman: Steersman, nodes: Nodes) -> None:
    assert train("--no-follow").exit_code == 0
    pod = nodes.pod_of(FIRST)
    assert "no node has been chosen" in shown(steersman)["progress"]["message"]
    assert "has a log" in steersman("jobs", "logs", "mine").stderr
    nodes.run(pod)
    reaches(steersman, "running")
    # There is no kubelet to ask.
    unread = steersman("jobs", "logs", "mine")
    assert unread.exit_code == 1
    assert "error: cannot get pods/log" in unread.stderr
    assert "no preferred addresses found" in unread.stderr
    listed = steersman("jobs", "list")
    assert (listed.exit_code, "mine" in listed.stdout) == (0, True), listed.output
    nodes.finish(pod, {"exitCode": 0, "reason": "Completed"})
    watched = steersman("jobs", "watch", "mine")
    assert watched.exit_code == 0, watched.output
    assert watched.stdout.splitlines()[-1] == "mine succeeded. Its run folder: /data/runs/mine of the runs volume"


def test_a_failed_job_goes_on_as_the_next_attempt(train: Steersman, steersman: Steersman, nodes: Nodes) -> None:
    assert train("--no-follow").exit_code == 0
    pod = nodes.pod_of(FIRST)
    nodes.run(pod)
    nodes.finish(pod, {"exitCode": 1, "reason": "Error", "message": "ValueError: no such file"})
    watched = steersman("jobs", "watch", "mine")
    assert watched.exit_code == 1
    assert f"job mine is failed: exited with status 1 in pod {pod}" in watched.stderr
    assert steersman("jobs", "resume", "mine").stdout == "mine is pending\n"
    nodes.pod_of(SECOND)
    assert shown(steersman)["num_attempts"] == 2
    deleted = steersman("jobs", "delete", "mine")
    assert deleted.stdout == "mine is being deleted: 2 attempts\n", deleted.output
    eventually(lambda: steersman("jobs", "get", "mine").exit_code == 1, "the job is gone")


def test_cancelled_is_suspended_and_resumed_is_not(train: Steersman, steersman: Steersman, nodes: Nodes) -> None:
    assert train("--no-follow").exit_code == 0
    pod = nodes.pod_of(FIRST)
    nodes.run(pod)
    reaches(steersman, "running")
    assert steersman("jobs", "cancel", "mine").stdout == "mine is cancelling\n"
    eventually(lambda: nodes.pod(pod)["metadata"].get("deletionTimestamp"), "the pod is told to end")
    assert nodes.pod(pod)["metadata"]["deletionGracePeriodSeconds"] == 120
    nodes.end(pod)
    reaches(steersman, "cancelled")
    assert steersman("jobs", "cancel", "mine").stdout == "mine is cancelled\n"
    assert steersman("jobs", "resume", "mine").stdout == "mine is pending\n"
    nodes.run(nodes.pod_of(FIRST, but=pod))
    reaches(steersman, "running")


def test_nothing_stays_of_a_job_that_is_deleted(
    train: Steersman, steersman: Steersman, accounts: ControlPlane, nodes: Nodes, namespace: str
) -> None:
    assert train("--no-follow", "--nodes", "2").exit_code == 0
    pods = [nodes.pod_of(FIRST, index=index) for index in (0, 1)]
    for pod in pods:
        nodes.run(pod)
    assert steersman("jobs", "delete", "mine").stdout == "mine is being deleted: 1 attempt\n"
    assert shown(steersman)["state"] == "cancelling"
    for pod in pods:
        eventually(lambda pod=pod: nodes.pod(pod)["metadata"].get("deletionTimestamp"), "the pods are told to end")
        nodes.end(pod)
    for kind in ("Job", "Service"):
        path = path_of(kind, namespace, FIRST)
        eventually(lambda path=path: accounts.admin.get(path) is None, f"the {kind} is gone")


def test_somebody_without_rights_is_told_what_to_grant(
    train: Steersman, accounts: ControlPlane, sign_in: SignIn, namespace: str
) -> None:
    sign_in("training-job")
    refused = train("--no-follow")
    assert refused.exit_code == 1
    (line,) = refused.stderr.splitlines()
    assert f"error: cannot list jobs.batch in namespace {namespace}: 403: " in line
    assert "apiGroups: ['batch'], resources: ['jobs'], verbs: ['list']" in line
