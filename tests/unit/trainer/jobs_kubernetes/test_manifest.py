"""The Job of a run folder: valid by the schemas of Kubernetes, safe, findable, with what was asked for."""

from typing import Any

import kubernetes_validate
import pytest
from pydantic import ValidationError

from steersman.cluster.objects import Workload, object_name, workload_objects
from steersman.cluster.resources import JobResources
from steersman.cluster.settings import KubernetesSettings
from steersman.trainer.jobs.node import Node, main

BARE: dict[str, Any] = {"image": "registry.test/trainer:1", "run_claim": "runs"}
FULL: dict[str, Any] = BARE | {
    "image_pull_secrets": ("registry",),
    "run_sub_path": "team",
    "run_mount_path": "/data/runs",
    "volumes": (
        {"mount_path": "/models", "claim": "models", "read_only": True},
        {"mount_path": "/tls", "secret": "trainer-tls"},
        {"mount_path": "/ca", "config_map": "authority"},
        {"mount_path": "/dev/shm", "memory_bytes": 2**30},
    ),
    "env": {"HF_HUB_OFFLINE": "1", "HOME": "/data/home"},
    "env_from_secrets": ("hub-token",),
    "service_account": "training",
    "node_selector": {"pool": "gpu"},
    "tolerations": ({"key": "nvidia.com/gpu", "effect": "NoSchedule"}, {"operator": "Equal", "key": "a", "value": "b"}),
    "priority_class": "low",
    "labels": {"team": "alignment"},
    "annotations": {"example.com/cost": "7"},
    "queue_name": "research",
}
VERSIONS = ("1.29", "1.31", "1.33", "1.35", "1.37")


def manifest(settings: dict[str, Any], *, attempt: int = 1, job_id: str = "ppo-1", **resources: Any) -> dict[str, Any]:
    workload = Workload(
        job_id=job_id,
        kind="ppo",
        run_directory=f"/data/runs/{job_id}",
        resources=JobResources(**resources),
        attempt=attempt,
        user=1000,
        group=2000,
    )
    return workload_objects(workload, KubernetesSettings(**settings), namespace="rl")[0]


def several(settings: dict[str, Any], **resources: Any) -> list[dict[str, Any]]:
    """The objects of a job of 2 nodes with 4 processes each."""
    workload = Workload(
        job_id="ppo-1",
        kind="ppo",
        run_directory="/data/runs/ppo-1",
        resources=JobResources(num_processes=8, processes_per_node=4, **resources),
        attempt=3,
        user=1000,
        group=2000,
    )
    return workload_objects(workload, KubernetesSettings(**settings), namespace="rl")


def container(job: dict[str, Any]) -> dict[str, Any]:
    (only,) = job["spec"]["template"]["spec"]["containers"]
    return dict(only)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("settings", [BARE, FULL], ids=["bare", "full"])
def test_the_schemas_of_kubernetes_take_it(settings: dict[str, Any], version: str) -> None:
    asked = {"gpus_per_process": 1, "cpus_per_process": 2.5, "memory_bytes_per_process": 2**34, "labels": {"run": "a"}}
    job = manifest(settings, **asked)
    kubernetes_validate.validate(job, version, strict=True)
    pod = job["spec"]["template"]["spec"]
    # What schemas do not see.
    names = [volume["name"] for volume in pod["volumes"]]
    assert len(set(names)) == len(names)
    assert {mount["name"] for mount in container(job)["volumeMounts"]} == set(names)
    assert len({one["name"] for one in container(job)["env"]}) == len(container(job)["env"])


def test_a_wrong_object_would_be_seen() -> None:
    job = manifest(BARE)
    job["spec"]["backofLimit"] = 0
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)


def test_only_the_cluster_and_the_workers_own_stop_are_tried_again() -> None:
    spec = manifest(BARE)["spec"]
    assert spec["backoffLimit"] == 0
    assert spec["podReplacementPolicy"] == "Failed"
    # podFailurePolicy is refused with any other.
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    disrupted, stopped = spec["podFailurePolicy"]["rules"]
    assert disrupted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert stopped["onExitCodes"] == {
        "containerName": container(manifest(BARE))["name"],
        "operator": "In",
        "values": [143],
    }


def test_it_runs_as_no_root_and_writes_only_to_volumes() -> None:
    job = manifest(BARE)
    pod = job["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]) == (1000, 2000)
    assert container(job)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert manifest(FULL)["spec"]["template"]["spec"]["automountServiceAccountToken"] is True


def test_the_worker_sees_the_runs_where_the_service_does() -> None:
    for settings in (BARE, FULL):
        job = manifest(settings)
        assert container(job)["command"][-2:] == ["steersman.trainer.jobs.worker", "/data/runs/ppo-1"]
        assert container(job)["volumeMounts"][0]["mountPath"] == "/data/runs"


def test_the_handle_is_made_of_what_stands_before_it() -> None:
    env = container(manifest(BARE))["env"]
    names = [one["name"] for one in env]
    handle = env[names.index("STEERSMAN_WORKER_HANDLE")]["value"]
    assert handle == "$(STEERSMAN_POD_NAMESPACE)/$(STEERSMAN_POD_JOB)/$(STEERSMAN_POD_JOB_UID)"
    before = names[: names.index("STEERSMAN_WORKER_HANDLE")]
    assert all(f"$({name})" in handle for name in before)


def test_resources_are_what_was_asked_for_or_the_clusters_default() -> None:
    asked = container(manifest(BARE, gpus_per_process=1, cpus_per_process=0.5, memory_bytes_per_process=2**33))
    expected = {"cpu": "500m", "memory": str(2**33), "nvidia.com/gpu": "1"}
    assert asked["resources"] == {"requests": expected, "limits": expected}
    plain = {"cpu": "1000m", "memory": str(2**32)}
    assert container(manifest(BARE))["resources"] == {"requests": plain, "limits": plain}
    amd = container(manifest(BARE | {"gpu_resource": "amd.com/gpu"}, gpus_per_process=1))
    assert amd["resources"]["limits"]["amd.com/gpu"] == "1"


def test_a_queue_begins_suspended_and_only_a_queue_does() -> None:
    assert "suspend" not in manifest(BARE)["spec"]
    for job in (manifest(FULL), manifest(BARE, queue_name="research")):
        assert job["spec"]["suspend"] is True
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert manifest(FULL, queue_name="urgent")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "urgent"


def test_labels_of_people_never_hide_those_it_is_found_by() -> None:
    job = manifest(FULL, labels={"run": "a", "steersman/job-id": "other"})
    for metadata in (job["metadata"], job["spec"]["template"]["metadata"]):
        assert metadata["labels"] | {"team": "alignment", "run": "a", "steersman/job-id": "ppo-1"} == metadata["labels"]


def test_names_fit_labels_and_differ() -> None:
    long = ["a" * 63, "a" * 62 + "b", "a" * 40 + "-" * 10 + "c"]
    names = [object_name(one, attempt) for one in ["x", *long] for attempt in (1, 2, 123)]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 63 for name in names)
    assert object_name("x", 2) == "steersman-x-2"


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"run_claim": "runs"}, "image"),
        (BARE | {"run_claim": "Runs"}, "run_claim"),
        (BARE | {"run_mount_path": "runs"}, "run_mount_path"),
        (BARE | {"labels": {"app.kubernetes.io/name": "x"}}, "labels"),
        (BARE | {"labels": {"a": "no value!"}}, "labels"),
        (BARE | {"volumes": ({"mount_path": "/x"},)}, "volumes"),
        (BARE | {"volumes": ({"mount_path": "/x", "claim": "a", "secret": "b"},)}, "volumes"),
        (BARE | {"run_as_user": 0}, "run_as_user"),
        (BARE | {"env": {"STEERSMAN_WORKER_HANDLE": "x"}}, "env"),
        (BARE | {"env": {"A=B": "x"}}, "env"),
        (BARE | {"queue": "x"}, "queue"),
    ],
)
def test_settings_that_no_cluster_takes_are_named(settings: dict[str, Any], path: str) -> None:
    with pytest.raises(ValidationError) as caught:
        KubernetesSettings(**settings)
    assert [error["loc"][0] for error in caught.value.errors()] == [path]


@pytest.mark.parametrize("path", ["/tmp", "/runs/", "/models"])
def test_no_two_volumes_are_mounted_at_one_place(path: str) -> None:
    volumes = ({"mount_path": "/models", "claim": "models"}, {"mount_path": path, "claim": "more"})
    with pytest.raises(ValidationError, match=r"volumes\.1\.mount_path is .*another volume"):
        KubernetesSettings(**BARE, run_mount_path="/runs", volumes=volumes)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("settings", [BARE, FULL], ids=["bare", "full"])
def test_several_nodes_are_an_indexed_job_and_the_names_of_its_pods(settings: dict[str, Any], version: str) -> None:
    job, service = several(settings, gpus_per_process=1)
    for thing in (job, service):
        kubernetes_validate.validate(thing, version, strict=True)
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    # One failure is a failure of all: no backoff of its own for an index.
    assert (spec["backoffLimit"], "backoffLimitPerIndex" in spec) == (0, False)
    assert [rule["action"] for rule in spec["podFailurePolicy"]["rules"]] == ["Ignore", "Ignore"]
    pod = spec["template"]
    assert pod["spec"]["subdomain"] == service["metadata"]["name"] == "steersman-ppo-1-3"
    assert service["spec"] | {"selector": None} == {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": None,
    }
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()


def test_the_command_of_several_nodes_is_one_that_a_node_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    command = container(several(BARE | {"termination_grace_seconds": 60, "join_seconds": 600})[0])["command"]
    assert command[:4] == ["python", "-P", "-m", "steersman.trainer.jobs.node"]
    taken: list[Node] = []

    async def run_node(node: Node) -> int:
        taken.append(node)
        return 7

    monkeypatch.setattr("steersman.trainer.jobs.node.run_node", run_node)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert main(command[4:]) == 7
    (node,) = taken
    assert (node.patience.join, node.place.grace) == (600.0, 55.0)
    assert (node.place.node, node.place.num_nodes, node.place.num_processes) == (1, 2, 4)
    assert (node.place.coordinator, node.place.port) == ("steersman-ppo-1-3-0.steersman-ppo-1-3", 29400)


def test_one_node_with_several_processes_needs_no_names() -> None:
    job = manifest(BARE, num_processes=4, gpus_per_process=1, cpus_per_process=2.0)
    command = container(job)["command"]
    assert command[command.index("--coordinator") + 1] == "127.0.0.1"
    assert ("completionMode" in job["spec"], "subdomain" in job["spec"]["template"]["spec"]) == (False, False)
    limits = container(job)["resources"]["limits"]
    assert limits == {"cpu": "8000m", "memory": str(4 * 2**32), "nvidia.com/gpu": "4"}


def test_a_jobset_wraps_the_same_pods() -> None:
    job, _ = several(FULL)
    (jobset,) = several(FULL | {"jobset": True})
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"] == job["metadata"]
    spec = jobset["spec"]
    assert spec["suspend"] is True
    assert spec["network"] == {
        "enableDNSHostnames": True,
        "subdomain": "steersman-ppo-1-3",
        "publishNotReadyAddresses": True,
    }
    assert spec["failurePolicy"] == {"maxRestarts": 0}
    (replicated,) = spec["replicatedJobs"]
    wrapped = replicated["template"]["spec"]
    kubernetes_validate.validate(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": wrapped}, "1.31", strict=True
    )
    assert set(job["spec"]) - set(wrapped) == {"suspend", "ttlSecondsAfterFinished"}
    command = container({"spec": wrapped})["command"]
    assert command[command.index("--coordinator") + 1] == "steersman-ppo-1-3-workers-0-0.steersman-ppo-1-3"
    env = {one["name"]: one for one in container({"spec": wrapped})["env"]}
    handle = "$(STEERSMAN_POD_NAMESPACE)/jobsets/$(STEERSMAN_POD_JOB)/$(STEERSMAN_POD_JOB_UID)"
    assert env["STEERSMAN_WORKER_HANDLE"]["value"] == handle
    uid = env["STEERSMAN_POD_JOB_UID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert uid == "metadata.labels['jobset.sigs.k8s.io/jobset-uid']"
    # One node is a Job, whatever the settings.
    assert manifest(FULL | {"jobset": True})["kind"] == "Job"


def test_processes_of_one_pod_share_memory() -> None:
    def shared(settings: dict[str, Any]) -> list[dict[str, Any]]:
        job = several(settings)[0]
        (found,) = [one for one in container(job)["volumeMounts"] if one["mountPath"] == "/dev/shm"] or [None]
        volumes = job["spec"]["template"]["spec"]["volumes"]
        return [one["emptyDir"] for one in volumes if found and one["name"] == found["name"]]

    assert shared(BARE | {"shared_memory_bytes": 2**33}) == [{"medium": "Memory", "sizeLimit": str(2**33)}]
    assert shared(BARE | {"shared_memory_bytes": 0}) == []
    # A volume that the settings name stays.
    assert shared(FULL) == [{"medium": "Memory", "sizeLimit": str(2**30)}]
    mounts = [one["mountPath"] for one in container(manifest(BARE))["volumeMounts"]]
    assert "/dev/shm" not in mounts


def test_what_nodes_talk_over_and_need_besides() -> None:
    job = several(BARE | {"network_interface": "eth0", "extra_resources": {"rdma/hca": "1"}})[0]
    env = {one["name"]: one.get("value") for one in container(job)["env"]}
    assert (env["NCCL_SOCKET_IFNAME"], env["GLOO_SOCKET_IFNAME"]) == ("eth0", "eth0")
    assert container(job)["resources"]["limits"]["rdma/hca"] == "1"


def test_host_names_of_pods_fit() -> None:
    name = object_name("a" * 63, 12345)
    assert len(f"{name}-workers-0-9999") <= 63
