"""The Job of a run folder: valid by the schemas of Kubernetes, safe, findable, with what was asked for."""

from typing import Any

import kubernetes_validate
import pytest
from pydantic import ValidationError

from steersman.cluster.objects import Workload, object_name, workload_objects
from steersman.cluster.resources import JobResources
from steersman.cluster.settings import KubernetesSettings

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
