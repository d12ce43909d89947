"""Every image runs as a pod would run it, and answers its health check from the inside."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from containers import VERSION, Podman, image_name

pytestmark = [pytest.mark.images, pytest.mark.slow, pytest.mark.timeout(900)]

NAMES = ("client", "policy-cpu", "reference", "reward", "trainer")
SETTINGS = {
    "policy-cpu": {"MODEL": "/models/policy", "KV_CACHE_MIB": "64", "MAX_MODEL_LEN": "256", "MAX_NUM_SEQS": "8"},
    "reference": {"MODEL": "/models/policy"},
    "reward": {"SCORERS": '{"reward": {"model": "/models/reward"}}'},
    "trainer": {"RUNS_DIRECTORY": "/data/runs"},
}
# One call of each over the port of the service.
CALLS = {
    "policy-cpu": """
from steersman.client import PolicyClient
with PolicyClient("127.0.0.1:50051") as policy:
    print(len(policy.generate("question 1? ", num_samples=2, max_tokens=4)))
""",
    "reference": """
from steersman.client import ReferenceClient
with ReferenceClient("127.0.0.1:50052") as reference:
    print(reference.model().name)
""",
    "reward": """
from steersman.client import RewardClient
with RewardClient("127.0.0.1:50053") as reward:
    print([score.error for score in reward.score(prompt="question 1? ", responses=["yes", "no"])])
""",
    "trainer": """
from steersman.client import TrainerClient
with TrainerClient("127.0.0.1:50054") as trainer:
    print(len(list(trainer.list_jobs())))
""",
}
ANSWERS = {"policy-cpu": "2", "reference": "policy", "reward": "[None, None]", "trainer": "0"}
# Those that the manifests set: no root, no capability, nothing to write but /tmp.
STRICT = (
    "--pull=never",
    "--network=none",
    "--read-only",
    "--read-only-tmpfs=false",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    "--tmpfs=/tmp:rw,mode=1777",
)


def built(podman: Podman, name: str) -> str:
    image = image_name(name)
    if not podman.has(image):
        pytest.skip(f"{image} is not built: scripts/build_images.py {name} --builder buildah")
    return image


@contextmanager
def serving(podman: Podman, name: str, models: Path) -> Iterator[str]:
    variables = SETTINGS[name] | {"HEALTH_PORT": "8081", "GRACE_SECONDS": "5"}
    container = podman.output(
        "run",
        "--detach",
        *STRICT,
        "--tmpfs=/data/runs:rw,mode=1777",
        f"--volume={models}:/models:ro",
        "--env=OMP_NUM_THREADS=1",
        *(f"--env=STEERSMAN_{key}={value}" for key, value in variables.items()),
        built(podman, name),
    ).strip()
    try:
        podman.wait_until_serving(container)
        yield container
    finally:
        podman("rm", "--force", "--time=0", container)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_server_answers_inside_its_container_and_ends_when_told(podman: Podman, models: Path, name: str) -> None:
    with serving(podman, name, models) as container:
        assert podman.output("exec", container, "python", "-c", CALLS[name]).strip() == ANSWERS[name]
        status = podman.output("exec", container, "grep", "-E", "^(Uid|CapEff|NoNewPrivs)", "/proc/1/status").split()
        assert status == ["Uid:", *["10001"] * 4, "CapEff:", "0" * 16, "NoNewPrivs:", "1"]
        for path in ("/opt/steersman/x", "/opt/sources/x", "/var/x", "/models/x"):
            assert "Read-only file system" in podman("exec", container, "touch", path).stderr
        # As long as it drains it must not be killed.
        podman.output("stop", "--time=120", container, timeout=150)
        assert podman.output("inspect", "--format={{.State.ExitCode}}", container).strip() == "0"


def test_the_command_needs_no_torch(podman: Podman) -> None:
    image = built(podman, "client")
    assert podman.output("run", "--rm", *STRICT, image, "--version").strip() == f"steersman {VERSION}"
    unknown = podman("run", "--rm", *STRICT, image, "status", "--reward", "127.0.0.1:1", "--json")
    assert unknown.returncode == 1
    assert json.loads(unknown.stdout)[0]["health"] == "UNAVAILABLE"
    found = podman(
        "run",
        "--rm",
        *STRICT,
        "--entrypoint=python3",
        image,
        "-c",
        "import importlib.util as u; print(u.find_spec('torch'))",
    )
    assert found.stdout.strip() == "None"
    assert int(podman.output("image", "inspect", "--format={{.Size}}", image)) < 400e6


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_build_is_left(podman: Podman, name: str) -> None:
    image = built(podman, name)
    (about,) = json.loads(podman.output("image", "inspect", image))
    assert about["User"] == "10001:10001"
    labels = about["Labels"]
    assert labels["org.opencontainers.image.title"] == f"steersman-{name}"
    assert labels["org.opencontainers.image.version"] == VERSION
    assert labels["org.opencontainers.image.revision"]
    assert not any(value.startswith("PIP_") for value in about["Config"]["Env"])
    left = "ls -d /src /opt/pip /etc/pip.conf /run/secrets /root/.cache /opt/steersman/bin/pip* /var/lib/apt/lists/*_*"
    found = podman("run", "--rm", *STRICT, "--entrypoint=sh", image, "-c", f"{left} 2>/dev/null")
    assert found.stdout == ""
