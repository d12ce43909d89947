"""The component that spreads a policy replica over several nodes, upon the overlay with everything else."""

import os
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from overlays import K8S, Object, Overlay, kustomize, matches, render

from steersman.policy.engine.bond import bond_port
from steersman.policy.settings import PolicySettings

VERSIONS = ("1.29", "1.32", "1.34", "1.37")
INDEX = "apps.kubernetes.io/pod-index"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Overlay:
    if kustomize() is None:
        pytest.skip("neither kustomize nor kubectl is installed, so no overlay can be rendered")
    folder = tmp_path_factory.mktemp("overlay")
    here = Path(os.path.relpath(K8S, folder.resolve()))
    made = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [str(here / "overlays" / "prod")],
        "components": [str(here / "components" / "multi-node-vllm")],
        "namespace": "steersman",
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(made))
    return render(str(folder))


def environment(container: Object, number: int) -> dict[str, str]:
    """What a pod of this number gets."""
    made = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    for one in container["env"]:
        if one.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath") == f"metadata.labels['{INDEX}']":
            made[one["name"]] = str(number)
    return made


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schemas_take_what_it_makes(nodes: Overlay, version: str) -> None:
    for kind in ("StatefulSet", "Service", "NetworkPolicy"):
        for one in nodes.of(kind).values():
            kubernetes_validate.validate(one, version, strict=True)


def test_policy_is_a_stateful_set_and_nothing_else(nodes: Overlay) -> None:
    assert set(nodes.of("Deployment")) == {"reference", "reward", "trainer"}
    assert set(nodes.of("StatefulSet")) == {"policy"}
    assert "policy" not in nodes.of("HorizontalPodAutoscaler")


def test_only_the_first_pod_is_a_replica_and_all_find_each_other_before_they_are_ready(nodes: Overlay) -> None:
    labels = nodes.of("StatefulSet")["policy"]["spec"]["template"]["metadata"]["labels"]
    services = nodes.of("Service")
    together, replica = services["policy-nodes"]["spec"], services["policy"]["spec"]
    for number in (0, 1):
        pod = labels | {INDEX: str(number)}
        assert matches(together["selector"], pod)
        assert matches(replica["selector"], pod) == (number == 0)
    assert (together["clusterIP"], together["publishNotReadyAddresses"]) == ("None", True)
    assert nodes.of("StatefulSet")["policy"]["spec"]["serviceName"] == "policy-nodes"
    (rule,) = nodes.of("NetworkPolicy")["policy-nodes"]["spec"]["ingress"]
    assert "ports" not in rule
    assert all(matches(peer["podSelector"]["matchLabels"], labels) for peer in rule["from"])


def test_each_pod_loads_its_settings(nodes: Overlay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = nodes.of("StatefulSet")["policy"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    (tmp_path / "settings.yaml").write_text((K8S / "base" / "policy" / "settings.yaml").read_text())
    for number in range(spec["replicas"]):
        with monkeypatch.context() as patch:
            for name, value in environment(container, number).items():
                patch.setenv(name, value)
            settings = PolicySettings.load(["--config", str(tmp_path / "settings.yaml")])
        found = settings.nodes()
        assert found is not None
        assert (found.count, found.rank) == (spec["replicas"], number)
        assert found.address == "policy-0.policy-nodes"
        ports = {one["port"] for one in nodes.of("Service")["policy-nodes"]["spec"]["ports"]}
        assert ports == {found.port, bond_port(found)}
        num_gpus = settings.tensor_parallel_size * settings.pipeline_parallel_size
        assert num_gpus == spec["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
