"""The pods of the overlay `dev` come up together, score, and run PPO to its end."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from containers import ROOT, Podman, image_name
from kube_pods import PREFIX, claims, config_maps, pods, rendered

pytestmark = [pytest.mark.images, pytest.mark.slow, pytest.mark.timeout(1800)]

NETWORK = f"{PREFIX}network"
PORTS = {"policy": 50051, "reference": 50052, "reward": 50053, "trainer": 50054}
IMAGES = ("client", "policy-cpu", "reference", "reward", "trainer")


@pytest.fixture(scope="module")
def dev(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """The four services, serving."""
    for image in map(image_name, IMAGES):
        if not podman.has(image):
            pytest.skip(f"{image} is not built: scripts/build_images.py --builder buildah")
    objects = rendered("dev")
    if objects is None:
        pytest.skip("neither kustomize nor kubectl is installed, so the overlay cannot be rendered")
    if made := podman("network", "create", NETWORK).returncode:
        pytest.skip(f"podman makes no network here (exit status {made}), so containers cannot reach each other")
    manifest = tmp_path_factory.mktemp("dev") / "dev.yaml"
    manifest.write_text(yaml.safe_dump_all([*config_maps(objects), *claims(objects), *pods(objects)]))
    try:
        podman.output("play", "kube", f"--network={NETWORK}", str(manifest), timeout=900)
        for name in PORTS:
            podman.wait_until_serving(f"{name}-server")
        yield podman
    finally:
        podman("pod", "rm", "--force", "--time=5", *PORTS, timeout=300)
        volumes = {one["metadata"]["name"] for one in (*config_maps(objects), *claims(objects))}
        listed = podman("volume", "ls", "--quiet").stdout.split()
        podman("volume", "rm", "--force", *(one for one in listed if one in volumes or one.startswith(PREFIX)))
        podman("network", "rm", "--force", NETWORK)


def steersman(podman: Podman, *arguments: str, volumes: tuple[str, ...] = (), timeout: float = 120) -> str:
    """What the command prints, from a container of its own on the network of the pods."""
    mounts = [f"--volume={volume}" for volume in volumes]
    strict = ("--rm", "--pull=never", "--read-only", "--cap-drop=all", f"--network={NETWORK}")
    return podman.output("run", *strict, *mounts, image_name("client"), *arguments, timeout=timeout)


def test_the_services_score_and_train(dev: Podman, tmp_path: Path) -> None:
    addresses = [part for name, port in PORTS.items() for part in (f"--{name}", f"{name}:{port}")]
    found = json.loads(steersman(dev, "status", *addresses, "--json"))
    assert {row["service"]: row["health"] for row in found} == dict.fromkeys(PORTS, "SERVING")

    score = steersman(
        dev, "score", "--address", "reward:50053", "--prompt", "question 1? ", "--response", "yes", timeout=120
    )
    assert isinstance(json.loads(score)["score"], float)

    job = tmp_path / "ppo.yaml"
    job.write_text((ROOT / "k8s" / "overlays" / "dev" / "ppo.yaml").read_text())
    job.chmod(0o644)
    # In a cluster the replicas would be found by the API server.
    settings = ["--set", 'services.policies=["dns:///policy:50051"]', "--set", "total_steps=2"]
    submit = ["train", "ppo", "/job/ppo.yaml", "--address", "trainer:50054", "--job-id", "one", *settings]
    steersman(dev, *submit, volumes=(f"{job}:/job/ppo.yaml:ro",), timeout=900)

    (policy,) = json.loads(steersman(dev, "status", "--policy", "policy:50051", "--json"))
    assert policy["weight_version"] == "one.1@2"
    assert "model.safetensors" in dev.output("exec", "trainer-server", "ls", "/data/runs/one/model")
