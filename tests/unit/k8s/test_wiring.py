"""Objects that point to each other do so, and rights are as few as they can be."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from overlays import K8S, OVERLAYS, Overlay, matches

from steersman.cluster.objects import Workload, workload_objects
from steersman.cluster.resources import JobResources
from steersman.trainer.discovery.slices import DEFAULT_PORT_NAME
from steersman.trainer.jobs.settings import TrainerSettings
from steersman.trainer.stages.ppo_config import PpoConfig

JOB_FILES = sorted(K8S.glob("overlays/*/ppo.yaml"))


def job_of(overlay: Overlay, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Job as the trainer service of an overlay would make it."""
    settings = overlay.settings("trainer", folder, monkeypatch)
    assert isinstance(settings, TrainerSettings)
    assert settings.kubernetes is not None
    workload = Workload(
        job_id="one",
        kind="ppo",
        run_directory=str(settings.runs_directory / "one"),
        resources=JobResources(),
        attempt=1,
        user=10001,
        group=10001,
    )
    return workload_objects(workload, settings.kubernetes, namespace="steersman")[0]


def test_a_service_selects_the_pods_of_its_deployment_alone(overlay: Overlay, tmp_path, monkeypatch) -> None:
    job = job_of(overlay, tmp_path, monkeypatch)["spec"]["template"]["metadata"]["labels"]
    pods = {name: pod["metadata"]["labels"] for name, pod in overlay.pods().items()} | {"a training job": job}
    selecting = {name: one["spec"]["selector"] for name, one in overlay.of("Service").items()}
    selecting |= {name: one["spec"]["selector"]["matchLabels"] for name, one in overlay.of("Deployment").items()}
    for one in (*overlay.of("PodDisruptionBudget").values(),):
        assert one["spec"]["selector"]["matchLabels"] == selecting[one["metadata"]["name"]]
    for name, selector in selecting.items():
        assert [pod for pod, labels in pods.items() if matches(selector, labels)] == [name]
    for name, pod in overlay.pods().items():
        for spread in pod["spec"].get("topologySpreadConstraints", ()):
            assert spread["labelSelector"]["matchLabels"] == selecting[name]


def test_services_are_headless_and_name_ports_of_their_pods(overlay: Overlay) -> None:
    for name, service in overlay.of("Service").items():
        assert service["spec"]["clusterIP"] == "None"
        ports = {port["name"]: port["containerPort"] for port in overlay.server(name)["ports"]}
        # Without a virtual address `port` is not translated.
        assert all(ports[port["targetPort"]] == port["port"] for port in service["spec"]["ports"])


def test_all_but_the_trainer_have_a_disruption_budget(overlay: Overlay) -> None:
    assert set(overlay.of("PodDisruptionBudget")) == {"policy", "reference", "reward"}


def test_training_jobs_give_way_to_servers(overlay: Overlay, tmp_path, monkeypatch) -> None:
    classes = overlay.of("PriorityClass")
    named = {pod["spec"].get("priorityClassName") for pod in overlay.pods().values()}
    jobs = job_of(overlay, tmp_path, monkeypatch)["spec"]["template"]["spec"].get("priorityClassName")
    if overlay.name == "dev":
        assert (classes, named, jobs) == ({}, {None}, None)
        return
    assert named | {jobs} == set(classes) == {"steersman-serving", "steersman-training"}
    assert jobs == "steersman-training"
    assert 0 < classes[jobs]["value"] < classes["steersman-serving"]["value"] < 1_000_000_000
    assert classes[jobs]["preemptionPolicy"] == "Never"
    # Of the whole cluster: a namespace is refused.
    assert all("namespace" not in one["metadata"] for one in classes.values())


def test_the_trainer_is_one(overlay: Overlay) -> None:
    spec = overlay.of("Deployment")["trainer"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_rights_are_those_that_are_needed(overlay: Overlay) -> None:
    rules = {name: role["rules"] for name, role in overlay.of("Role").items()}
    assert rules == {
        "trainer": [
            {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list", "create", "patch", "delete"]},
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "delete"]},
            {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
            {"apiGroups": [""], "resources": ["events"], "verbs": ["list"]},
        ],
        "training-job": [
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}
        ],
    }
    for name, binding in overlay.of("RoleBinding").items():
        assert binding["roleRef"]["name"] == name
        (subject,) = binding["subjects"]
        assert (subject["kind"], subject["name"]) == ("ServiceAccount", name)
    assert not any(one["kind"].startswith("ClusterRole") for one in overlay.objects)


def test_a_training_job_finds_what_it_names(overlay: Overlay, tmp_path, monkeypatch) -> None:
    job = job_of(overlay, tmp_path, monkeypatch)
    pod = job["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] in overlay.of("ServiceAccount")
    assert [one["image"] for one in pod["containers"]] == [overlay.server("trainer")["image"]]
    claims = {one["persistentVolumeClaim"]["claimName"] for one in pod["volumes"] if "persistentVolumeClaim" in one}
    assert claims == {"models", "runs"}
    secrets = {one["secret"]["secretName"] for one in pod["volumes"] if "secret" in one}
    assert secrets == ({"training-job-tls"} if overlay.of("Certificate") else set())
    # The service and its workers share the folder of runs at one path.
    (runs,) = [one["mountPath"] for one in pod["containers"][0]["volumeMounts"] if one["name"] == "runs"]
    (own,) = [one["mountPath"] for one in overlay.server("trainer")["volumeMounts"] if one["name"] == "runs"]
    assert runs == own == "/data/runs"


def test_nothing_is_open_to_everybody(overlay: Overlay, tmp_path, monkeypatch) -> None:
    for name in overlay.pods():
        with monkeypatch.context() as patch:
            settings = overlay.settings(name, tmp_path, patch)
        closed = settings.tls is not None and settings.tls.client_ca is not None and settings.access_file is not None
        assert closed or settings.insecure
        assert not (closed and settings.insecure)
    # Without roles the network must do it, and with them it does no harm.
    policies = overlay.of("NetworkPolicy")
    assert policies["nothing-else"]["spec"]["policyTypes"] == ["Ingress"]
    assert "ingress" not in policies["nothing-else"]["spec"]
    for pod in overlay.pods().values():
        assert matches(policies["nothing-else"]["spec"]["podSelector"]["matchLabels"], pod["metadata"]["labels"])


def test_training_jobs_reach_what_they_call_and_no_more(overlay: Overlay, tmp_path, monkeypatch) -> None:
    job = job_of(overlay, tmp_path, monkeypatch)["spec"]["template"]["metadata"]["labels"]
    reached: dict[str, set[str]] = {}
    for policy in overlay.of("NetworkPolicy").values():
        spec = policy["spec"]
        for rule in spec.get("ingress", ()):
            peers = [peer["podSelector"]["matchLabels"] for peer in rule["from"] if "podSelector" in peer]
            if any(matches(peer, job) for peer in peers):
                names = [
                    name
                    for name, pod in overlay.pods().items()
                    if matches(spec["podSelector"]["matchLabels"], pod["metadata"]["labels"])
                ]
                for name in names:
                    reached.setdefault(name, set()).update(port["port"] for port in rule["ports"])
    assert reached == {"policy": {"grpc"}, "reference": {"grpc"}, "reward": {"grpc"}}


def test_rules_of_the_network_name_ports_of_pods(overlay: Overlay) -> None:
    for policy in overlay.of("NetworkPolicy").values():
        selector = policy["spec"]["podSelector"]["matchLabels"]
        selected = [name for name, pod in overlay.pods().items() if matches(selector, pod["metadata"]["labels"])]
        assert selected
        for rule in policy["spec"].get("ingress", ()):
            assert rule["from"], "an empty list lets everybody in"
            for name in selected:
                ports = {port["name"] for port in overlay.server(name)["ports"]}
                assert {port["port"] for port in rule["ports"]} <= ports


def test_autoscalers_scale_what_is_there(overlay: Overlay) -> None:
    for scaler in overlay.of("HorizontalPodAutoscaler").values():
        target = overlay.of("Deployment")[scaler["spec"]["scaleTargetRef"]["name"]]
        assert "replicas" not in target["spec"], "each apply would undo what the autoscaler did"
    assert bool(overlay.of("HorizontalPodAutoscaler")) == (overlay.name == "prod")


def test_prometheus_finds_the_metrics_of_every_service(overlay: Overlay) -> None:
    for monitor in overlay.of("ServiceMonitor").values():
        (endpoint,) = monitor["spec"]["endpoints"]
        for service in overlay.of("Service").values():
            assert matches(monitor["spec"]["selector"]["matchLabels"], service["metadata"]["labels"])
            assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        issued = {one["spec"]["secretName"] for one in overlay.of("Certificate").values()}
        tls = endpoint["tlsConfig"]
        assert {tls["ca"]["secret"]["name"], tls["cert"]["secret"]["name"], tls["keySecret"]["name"]} <= issued


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.parent.name)
def test_example_jobs_call_services_that_exist(path: Path) -> None:
    config = PpoConfig.model_validate(yaml.safe_load(path.read_text()))
    assert tuple(config.services.policies) == ("k8s:///policy",)
    assert (config.services.reference, config.services.reward) == ("k8s:///reference", "k8s:///reward")
    # The name of the port that is taken where an address names none.
    for name in ("policy", "reference", "reward"):
        service = yaml.safe_load((K8S / "base" / name / "service.yaml").read_text())
        assert DEFAULT_PORT_NAME in {port["name"] for port in service["spec"]["ports"]}
    encrypted = config.services.credentials is not None
    assert encrypted == (path.parent.name == "prod")


def test_every_overlay_is_tested() -> None:
    assert sorted(path.name for path in (K8S / "overlays").iterdir()) == sorted(OVERLAYS)
