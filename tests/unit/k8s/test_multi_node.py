"""The component for jobs on several nodes, on top of an overlay."""

import os
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from overlays import K8S, Overlay, kustomize

from steersman.cluster.objects import Workload, workload_objects
from steersman.cluster.resources import JobResources
from steersman.cluster.settings import KubernetesSettings


@pytest.fixture(scope="module")
def with_nodes(tmp_path_factory: pytest.TempPathFactory) -> Overlay:
    if (command := kustomize()) is None:
        pytest.skip("needs kustomize or kubectl on the PATH")
    # Bases are named by relative paths, and links count as where they lead.
    folder = tmp_path_factory.mktemp("overlay").resolve()
    base, component = (
        os.path.relpath(K8S / path, folder) for path in ("overlays/prod", "components/multi-node-trainer")
    )
    (folder / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": [base], "components": [component], "namespace": "steersman"})
    )
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return Overlay(name="with nodes", objects=tuple(yaml.safe_load_all(done.stdout)))


def test_the_service_may_name_pods(with_nodes: Overlay) -> None:
    rules = with_nodes.of("Role")["trainer"]["rules"]
    assert {"apiGroups": [""], "resources": ["services"], "verbs": ["create", "patch"]} in rules
    assert {
        "apiGroups": ["batch"],
        "resources": ["jobs"],
        "verbs": ["get", "list", "create", "patch", "delete"],
    } in rules


def test_pods_of_jobs_reach_each_other_and_are_reached_by_nobody_else(with_nodes: Overlay) -> None:
    policy = with_nodes.of("NetworkPolicy")["training-job"]
    kubernetes_validate.validate(policy, "1.31", strict=True)
    workload = Workload(
        job_id="one",
        kind="ppo",
        run_directory=str(Path("/data/runs/one")),
        resources=JobResources(num_processes=2, processes_per_node=1),
        attempt=1,
        user=10001,
        group=10001,
    )
    job, _ = workload_objects(workload, KubernetesSettings(image="a", run_claim="runs"), namespace="steersman")
    labels = job["spec"]["template"]["metadata"]["labels"]
    selector = policy["spec"]["podSelector"]["matchLabels"]
    assert selector.items() <= labels.items()
    (rule,) = policy["spec"]["ingress"]
    assert rule == {"from": [{"podSelector": {"matchLabels": selector}}]}
    # The policy that lets nothing in holds for these pods too, so this one is what opens them.
    assert (
        with_nodes.of("NetworkPolicy")["nothing-else"]["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    )
