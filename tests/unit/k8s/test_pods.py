"""What schemas do not see of pods: rights, limits, probes, and that everything they name is there."""

import re
from pathlib import Path

import pytest
from overlays import SETTINGS, Overlay

# Made outside: optional, or by whoever runs the cluster.
GIVEN_SECRETS = {"hub-token"}


def test_there_is_a_deployment_for_each_service(overlay: Overlay) -> None:
    assert set(overlay.of("Deployment")) == set(SETTINGS) == set(overlay.of("Service"))


def test_no_container_can_become_root_or_write_beside_its_volumes(overlay: Overlay) -> None:
    for pod in overlay.pods().values():
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])
        assert all("hostPath" not in volume for volume in pod["spec"]["volumes"])
    for name, container in overlay.containers():
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, name


def test_only_the_trainer_has_a_token(overlay: Overlay) -> None:
    tokens = {name: pod["spec"]["automountServiceAccountToken"] for name, pod in overlay.pods().items()}
    assert tokens == {"policy": False, "reference": False, "reward": False, "trainer": True}


def test_every_container_has_requests_and_limits(overlay: Overlay) -> None:
    for name, container in overlay.containers():
        for part in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][part]), name
        # What is not a multiple of whole devices, or differs, the API server refuses.
        requests, limits = (container["resources"][part].get("nvidia.com/gpu") for part in ("requests", "limits"))
        assert requests == limits, name


def test_gpus_are_asked_for_where_they_should_be(overlay: Overlay) -> None:
    asking = {name for name in overlay.pods() if "nvidia.com/gpu" in overlay.server(name)["resources"]["limits"]}
    assert asking == (set() if overlay.name == "dev" else {"policy", "reference", "reward"})
    image = overlay.server("policy")["image"].partition(":")[0]
    assert image == ("steersman/policy-cpu" if overlay.name == "dev" else "steersman/policy-gpu")


def test_images_have_a_version_and_no_host(overlay: Overlay) -> None:
    for name, container in overlay.containers():
        assert re.fullmatch(r"steersman/[a-z-]+:\d+\.\d+\.\d+", container["image"]), name


def test_there_is_a_dockerfile_for_every_image(overlay: Overlay) -> None:
    folder = Path(__file__).resolve().parents[3] / "docker"
    for name, container in overlay.containers():
        image = container["image"].partition("/")[2].partition(":")[0]
        assert (folder / f"{image}.Dockerfile").is_file(), name


def test_probes_ask_the_health_port(overlay: Overlay, tmp_path, monkeypatch) -> None:
    for name in overlay.pods():
        container = overlay.server(name)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        with monkeypatch.context() as patch:
            settings = overlay.settings(name, tmp_path, patch)
        assert ports == {"grpc": settings.port, "metrics": settings.metrics_port, "health": settings.health_port}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[kind]["grpc"] == {"port": ports["health"]}, f"{name} {kind}"
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= (120 if name == "trainer" else 900)
        deployment = overlay.of("Deployment")[name]["spec"]
        if name != "trainer":
            # Or a rollout is called failed while a model still loads.
            assert deployment["progressDeadlineSeconds"] > startup["periodSeconds"] * startup["failureThreshold"]


def test_a_pod_has_time_to_drain(overlay: Overlay, tmp_path, monkeypatch) -> None:
    for name, pod in overlay.pods().items():
        command = overlay.server(name)["lifecycle"]["preStop"]["exec"]["command"]
        assert command[0] == "sleep"
        with monkeypatch.context() as patch:
            grace = overlay.settings(name, tmp_path, patch).grace_seconds
        assert pod["spec"]["terminationGracePeriodSeconds"] >= float(command[1]) + grace + 10, name


def test_what_a_pod_names_is_there(overlay: Overlay) -> None:
    issued = {one["spec"]["secretName"] for one in overlay.of("Certificate").values()}
    for name, pod in overlay.pods().items():
        spec = pod["spec"]
        assert spec["serviceAccountName"] in overlay.of("ServiceAccount"), name
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert len(volumes) == len(spec["volumes"]), name
        for volume in volumes.values():
            if config_map := volume.get("configMap"):
                assert config_map["name"] in overlay.of("ConfigMap"), name
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in overlay.of("PersistentVolumeClaim"), name
            if secret := volume.get("secret"):
                assert secret["secretName"] in issued, name
        containers = (*spec["containers"], *spec.get("initContainers", ()))
        mounted = {mount["name"] for container in containers for mount in container["volumeMounts"]}
        assert mounted == set(volumes), name
        for container in containers:
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(set(paths)) == len(paths), name
            variables = [variable["name"] for variable in container["env"]]
            assert len(set(variables)) == len(variables), name
            for source in container.get("envFrom", ()):
                assert source["secretRef"]["name"] in GIVEN_SECRETS
                assert source["secretRef"]["optional"] is True


@pytest.mark.parametrize("volume", ["tmp", "shm"])
def test_what_is_written_has_a_bound(overlay: Overlay, volume: str) -> None:
    for name, pod in overlay.pods().items():
        for one in pod["spec"]["volumes"]:
            if one["name"] == volume:
                assert "sizeLimit" in one["emptyDir"], name
    shm = [one for one in overlay.pods()["policy"]["spec"]["volumes"] if one["name"] == "shm"]
    assert shm[0]["emptyDir"]["medium"] == "Memory"
