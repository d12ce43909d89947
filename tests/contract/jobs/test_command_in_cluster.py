"""`steersman ... --on kubernetes`: the command and the official client over HTTP, against an API server in the test.

The test plays the controllers and the kubelet.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from api_server import Refusal
from job_api_server import JobApiServer
from typer.testing import CliRunner, Result

from steersman.cli import cluster_watch
from steersman.cli.main import app
from steersman.cluster.lines import Told, write

CLUSTER = {"image": "trainer:1", "run_claim": "runs"}
SFT = {"model": {"path": "/models/base"}, "data": {"files": ["/data/train.jsonl"]}, "epochs": 1}
FIRST, SECOND = "steersman-mine-1", "steersman-mine-2"

Steersman = Callable[..., Result]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobApiServer]:
    with JobApiServer() as running:
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(running.kubeconfig()))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        # Read by the client when it was imported.
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        monkeypatch.setattr(cluster_watch, "POLL_SECONDS", 0.01)
        yield running


@pytest.fixture
def steersman(server: JobApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steersman:
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(SFT))
    monkeypatch.setenv("STEERSMAN_ON", "kubernetes")
    monkeypatch.setenv("STEERSMAN_CLUSTER", str(tmp_path / "cluster.yaml"))
    # Settings are checked by a process of their own, which is another test's.
    monkeypatch.setattr("steersman.cli.cluster.check_settings", lambda kind, config: True)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, arguments)

    return run


@pytest.fixture
def train(steersman: Steersman, tmp_path: Path) -> Steersman:
    def run(*arguments: str) -> Result:
        return steersman("train", "sft", str(tmp_path / "sft.yaml"), "--job-id", "mine", *arguments)

    return run


def running(server: JobApiServer, name: str = FIRST, index: int | None = None) -> str:
    pod = server.add_pod(name, {"phase": "Running"}, index=index)
    server.log(pod, "worker: job begins")
    return pod


def state(steersman: Steersman) -> str:
    return str(json.loads(steersman("jobs", "get", "mine").stdout)["state"])


def test_what_is_made_is_what_a_dry_run_prints(train: Steersman, server: JobApiServer) -> None:
    dry = train("--dry-run", "--nodes", "2", "--gpus", "4", "--cpus", "32", "--memory-gib", "64")
    assert dry.exit_code == 0, dry.output
    job, service = yaml.safe_load_all(dry.stdout)
    assert server.requests == []
    for thing in (job, service):
        kubernetes_validate.validate(thing, "1.31", strict=True)
    made = train("--no-follow", "--nodes", "2", "--gpus", "4", "--cpus", "32", "--memory-gib", "64")
    assert (made.exit_code, made.stdout) == (0, "mine\n"), made.output
    held = server.objects["services"][FIRST]
    assert server.job(FIRST)["spec"] == job["spec"]
    assert held["spec"] == service["spec"]
    uid = server.job(FIRST)["metadata"]["uid"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": FIRST, "uid": uid}
    assert held["metadata"]["ownerReferences"] == [owner]
    (limits,) = (one["resources"]["limits"] for one in job["spec"]["template"]["spec"]["containers"])
    assert limits == {"cpu": "32000m", "memory": str(64 * 2**30), "nvidia.com/gpu": "4"}


def test_a_job_of_this_name_is_made_once(train: Steersman, server: JobApiServer) -> None:
    train("--no-follow")
    again = train("--no-follow")
    assert again.exit_code == 1
    assert "job 'mine' is pending in rl; it runs" in again.stderr
    assert server.count("patch jobs") == 1


def test_a_job_is_followed_to_its_end(train: Steersman, steersman: Steersman, server: JobApiServer) -> None:
    train("--no-follow")
    pod = running(server)
    server.log(
        pod, write(Told(step=1, total_steps=2, message="drawing")), "noise", write(Told(step=1, metrics={"loss": 0.5}))
    )
    server.set_condition(FIRST, "Complete")
    server.set_pod(pod, {"phase": "Succeeded"})
    watched = steersman("jobs", "watch", "mine")
    assert watched.exit_code == 0, watched.output
    assert watched.stdout.splitlines() == [
        "step 1/2: drawing",
        "step 1: loss=0.5",
        "mine: succeeded",
        "mine succeeded. Its run folder: /data/runs/mine of the runs volume",
    ]


def test_a_failed_job_says_its_last_words_and_goes_on_as_the_next_attempt(
    train: Steersman, steersman: Steersman, server: JobApiServer
) -> None:
    train("--no-follow")
    ended = {"exitCode": 1, "reason": "Error", "message": "ValueError: no such file: /models/base"}
    pod = running(server)
    server.set_pod(pod, {"phase": "Failed", "containerStatuses": [{"name": "worker", "state": {"terminated": ended}}]})
    server.set_condition(FIRST, "Failed", reason="PodFailurePolicy")
    watched = steersman("jobs", "watch", "mine")
    assert watched.exit_code == 1
    assert f"error: job mine is failed: exited with status 1 in pod {pod}; it printed last:" in watched.stderr
    assert "no such file: /models/base" in watched.stderr
    assert steersman("jobs", "resume", "mine").stdout == "mine is pending\n"
    assert server.jobs() == [FIRST, SECOND]
    first, second = server.job(FIRST), server.job(SECOND)
    for metadata in (first["metadata"], second["metadata"]):
        assert json.loads(metadata["annotations"]["steersman/job"])["config"] == SFT
    assert json.loads(steersman("jobs", "get", "mine").stdout)["num_attempts"] == 2


def test_cancelled_is_suspended_and_resumed_is_not(
    train: Steersman, steersman: Steersman, server: JobApiServer
) -> None:
    train("--no-follow")
    pod = running(server)
    assert state(steersman) == "running"
    assert steersman("jobs", "cancel", "mine").stdout == "mine is cancelling\n"
    assert server.job(FIRST)["spec"]["suspend"] is True
    # The Job controller ends the pod with SIGTERM, and the worker writes its checkpoint.
    server.end_pod(pod)
    assert state(steersman) == "cancelled"
    assert steersman("jobs", "cancel", "mine").stdout == "mine is cancelled\n"
    listed = steersman("jobs", "list", "--state", "cancelled").stdout
    assert "mine" in listed
    assert steersman("jobs", "resume", "mine").stdout == "mine is pending\n"
    assert server.job(FIRST)["spec"]["suspend"] is False
    assert steersman("jobs", "resume", "mine").exit_code == 1


def test_a_job_in_a_queue_is_switched_by_kueue(train: Steersman, steersman: Steersman, server: JobApiServer) -> None:
    train("--no-follow", "--queue", "research")
    job = server.job(FIRST)
    assert (job["spec"]["suspend"], job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]) == (True, "research")
    assert "waits for Kueue to admit it from queue research" in steersman("jobs", "get", "mine").stdout
    without = steersman("jobs", "cancel", "mine")
    assert "Kueue has no Workload" in without.stderr
    labels = {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}
    server.objects["workloads"]["one"] = {"metadata": {"name": "one", "uid": "u", "labels": labels}, "spec": {}}
    assert steersman("jobs", "cancel", "mine").stdout == "mine is cancelled\n"
    assert server.objects["workloads"]["one"]["spec"] == {"active": False}
    assert server.job(FIRST)["spec"]["suspend"] is True
    assert steersman("jobs", "resume", "mine").stdout == "mine is pending\n"
    assert server.objects["workloads"]["one"]["spec"] == {"active": True}


def test_logs_are_those_of_the_newest_pod_of_a_node(
    train: Steersman, steersman: Steersman, server: JobApiServer
) -> None:
    train("--no-follow", "--nodes", "2")
    assert "has a log" in steersman("jobs", "logs", "mine").stderr
    for index in (0, 1):
        server.log(running(server, index=index), f"node {index}")
    assert steersman("jobs", "logs", "mine").stdout == "worker: job begins\nnode 0\n"
    assert steersman("jobs", "logs", "mine", "--node", "1", "--tail", "1").stdout == "node 1\n"


def test_a_log_that_cannot_be_read_is_no_empty_log(
    train: Steersman, steersman: Steersman, server: JobApiServer
) -> None:
    train("--no-follow")
    pod = running(server)
    server.refuse("get pods/log", Refusal(500, "no preferred addresses found"))
    refused = steersman("jobs", "logs", "mine")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert f"error: cannot get pods/log rl/{pod}: 500: no preferred addresses found" in refused.stderr
    assert "kubectl get nodes" in refused.stderr


def test_a_log_is_followed_over_a_preemption_each_line_once(
    train: Steersman, steersman: Steersman, server: JobApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("--no-follow")
    pod = running(server)
    moments = iter(["more", "preempted", "after", "end"])

    def pause(_seconds: float) -> None:
        match next(moments):
            case "more":
                server.log(pod, "one step")
            case "preempted":
                server.set_pod(pod, {"phase": "Failed", "reason": "Preempted"})
            case "after":
                running(server)
            case "end":
                server.set_condition(FIRST, "Complete")

    monkeypatch.setattr(cluster_watch, "pause", pause)
    followed = steersman("jobs", "logs", "mine", "--follow")
    assert followed.stdout == "worker: job begins\none step\nworker: job begins\n"
    assert "goes on" in followed.stderr


def test_nothing_stays_of_a_job_that_is_deleted(train: Steersman, steersman: Steersman, server: JobApiServer) -> None:
    train("--no-follow", "--nodes", "2")
    pod = running(server)
    assert steersman("jobs", "delete", "mine").stdout == "mine is being deleted: 1 attempt\n"
    assert state(steersman) == "cancelling"
    server.end_pod(pod)
    assert [server.objects[kind] for kind in ("jobs", "services", "pods")] == [{}, {}, {}]
    gone = steersman("jobs", "get", "mine")
    assert (gone.exit_code, "NOT_FOUND" in gone.stderr) == (1, True)


def test_a_jobset_where_the_cluster_file_asks_for_one(
    train: Steersman, steersman: Steersman, server: JobApiServer, tmp_path: Path
) -> None:
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER | {"jobset": True}))
    assert train("--no-follow", "--nodes", "2").exit_code == 0
    assert (server.jobs(), list(server.objects["jobsets"])) == ([], [FIRST])
    pod = running(server, index=0)
    assert state(steersman) == "running"
    steersman("jobs", "cancel", "mine")
    assert server.objects["jobsets"][FIRST]["spec"]["suspend"] is True
    server.objects["pods"].pop(pod)
    steersman("jobs", "resume", "mine")
    server.set_condition(FIRST, "Completed")
    assert state(steersman) == "succeeded"


def test_where_there_are_no_jobsets_there_are_jobs(
    train: Steersman, steersman: Steersman, server: JobApiServer, tmp_path: Path
) -> None:
    server.installed.clear()
    train("--no-follow")
    assert state(steersman) == "pending"
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER | {"jobset": True, "instance": "other"}))
    refused = train("--no-follow", "--nodes", "2")
    assert "cannot patch jobsets.jobset.x-k8s.io rl/steersman-mine-1" in refused.stderr
    assert "install the JobSet controller, or set kubernetes.jobset to false" in refused.stderr


def test_a_service_that_is_refused_takes_its_job_back(train: Steersman, server: JobApiServer) -> None:
    message = 'services is forbidden: User "me" cannot create resource "services" in API group "" in the namespace "rl"'
    server.refuse("patch services", Refusal(403, message))
    refused = train("--no-follow", "--nodes", "2")
    assert refused.exit_code == 1
    assert "cannot patch services rl/steersman-mine-1" in refused.stderr
    assert "resources: ['services'], verbs: ['create']" in refused.stderr
    assert server.jobs() == []


@pytest.mark.parametrize(
    ("request_", "refusal", "words"),
    [
        ("patch jobs", Refusal(401, "Unauthorized"), "log in again"),
        ("patch jobs", Refusal(403, "exceeded quota: team, requested: count/jobs.batch=1"), "ResourceQuota raised"),
        ("patch jobs", Refusal(422, 'Job.batch "x" is invalid: spec.suspend: bad'), "does not suit this cluster"),
        ("patch jobs", Refusal(409, 'conflict with "kubectl": .spec.backoffLimit'), "another manager has set"),
        ("list jobs", Refusal(403, 'admission webhook "x" denied the request'), "an admission policy"),
        ("list jobs", Refusal(429, "slow down", {"Retry-After": "1"}), "ask again in 1 s"),
        ("list jobs", Refusal(503, page=b"<html>away</html>"), "logs of the API server"),
        ("list jobs", Refusal(404, 'namespaces "rl" not found'), "create the namespace rl"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(
    train: Steersman, server: JobApiServer, request_: str, refusal: Refusal, words: str
) -> None:
    server.refuse(request_, refusal)
    refused = train("--no-follow")
    assert refused.exit_code == 1
    (line,) = refused.stderr.splitlines()
    verb, resource = request_.split()
    assert line.startswith(f"error: cannot {verb} {resource}.batch ")
    assert "rl" in line
    assert words in line
    assert server.jobs() == []


@pytest.mark.parametrize(
    ("pod", "words"),
    [
        (
            {
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
                    }
                ]
            },
            ("Insufficient nvidia.com/gpu", "free or add such a node"),
        ),
        (
            {
                "containerStatuses": [
                    {
                        "name": "worker",
                        "state": {
                            "waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "trainer:1"'}
                        },
                    }
                ]
            },
            ("ImagePullBackOff", "check kubernetes.image"),
        ),
        (
            {
                "containerStatuses": [
                    {"name": "worker", "state": {"waiting": {"reason": "ErrImagePull", "message": "manifest unknown"}}}
                ]
            },
            ("ErrImagePull: manifest unknown", "check kubernetes.image"),
        ),
        (
            {
                "containerStatuses": [
                    {
                        "name": "worker",
                        "state": {
                            "waiting": {
                                "reason": "CreateContainerConfigError",
                                "message": 'secret "hub-token" not found',
                            }
                        },
                    }
                ]
            },
            ('secret "hub-token" not found', "create the Secret"),
        ),
    ],
    ids=["no GPU", "back-off", "no image", "no secret"],
)
def test_why_a_pod_waits(
    train: Steersman, steersman: Steersman, server: JobApiServer, pod: dict[str, Any], words: tuple[str, ...]
) -> None:
    train("--no-follow")
    name = server.add_pod(FIRST, {"phase": "Pending"} | pod)
    shown = json.loads(steersman("jobs", "get", "mine").stdout)
    assert shown["state"] == "pending"
    for word in (name, *words):
        assert word in shown["progress"]["message"]


def test_a_server_that_is_away_for_a_while_is_waited_for(
    train: Steersman, steersman: Steersman, server: JobApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("--no-follow")
    waits: list[float] = []

    def pause(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 1:
            server.set_condition(FIRST, "Complete")
            server.refuse("list pods", Refusal(429, "slow down", {"Retry-After": "7"}), Refusal(500, "etcd is away"))

    monkeypatch.setattr(cluster_watch, "pause", pause)
    watched = steersman("jobs", "watch", "mine")
    assert watched.exit_code == 0, watched.output
    assert (waits[1], len(waits)) == (7.0, 3)
    notes = [line for line in watched.stdout.splitlines() if "trying again" in line]
    busy = "cannot list pods in namespace rl: 429: slow down; the API server is busy: ask again in 7 s; trying again"
    assert notes == [busy]


def test_what_is_half_made_while_the_server_is_busy_is_taken_back(train: Steersman, server: JobApiServer) -> None:
    server.refuse("patch services", Refusal(429, "slow down"))
    assert train("--no-follow", "--nodes", "2").exit_code == 1
    assert server.jobs() == []
    assert train("--no-follow", "--nodes", "2").exit_code == 0


def test_a_cluster_that_cannot_be_reached(steersman: Steersman, server: JobApiServer, tmp_path: Path) -> None:
    config = server.kubeconfig()
    config["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:9"
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    away = steersman("jobs", "list")
    assert away.exit_code == 1
    assert away.stderr == (
        "error: cannot list jobs.batch in namespace rl: the API server does not answer at http://127.0.0.1:9: "
        "[Errno 111] Connection refused; is the API server up, and can it be reached from here (network, proxy, "
        "NetworkPolicy)?\n"
    )
    assert steersman("jobs", "logs", "mine", "--follow").exit_code == 1


def test_an_api_server_that_stays_away_is_given_up(
    train: Steersman, steersman: Steersman, server: JobApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("--no-follow")
    monkeypatch.setattr(cluster_watch, "MAX_AWAY_SECONDS", -1.0)
    monkeypatch.setattr(cluster_watch, "pause", lambda _: server.refuse("list pods", Refusal(503, "away")))
    watched = steersman("jobs", "watch", "mine")
    assert (watched.exit_code, "cannot list pods in namespace rl: 503: away" in watched.stderr) == (1, True)


def test_without_a_kubeconfig(train: Steersman, steersman: Steersman, tmp_path: Path) -> None:
    (tmp_path / "kubeconfig").unlink()
    listed = steersman("jobs", "list")
    assert (listed.exit_code, len(listed.stderr.splitlines())) == (1, 1)
    assert "no way to the Kubernetes API" in listed.stderr
    assert "the kubeconfig has no context 'other'" in steersman("jobs", "list", "--context", "other").stderr
    dry = train("--dry-run")
    assert dry.exit_code == 0
    assert yaml.safe_load(dry.stdout)["metadata"]["namespace"] == "default"
    assert "the namespace is a guess" in dry.stderr
    assert yaml.safe_load(train("--dry-run", "--namespace", "rl").stdout)["metadata"]["namespace"] == "rl"


def test_what_is_missing_or_wrong_in_the_cluster_file_is_named(train: Steersman, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("run_claim: Runs\nqueue: x\n")
    refused = train("--dry-run")
    assert refused.exit_code == 2
    for word in ("image: Field required", "run_claim: ", "queue: "):
        assert word in refused.stderr
    assert train("--dry-run", "--gpus", "2", "--processes", "4").exit_code == 2
