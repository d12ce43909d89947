"""The reward server with the settings, certificates and callers that the overlay `prod` gives its pod."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from containers import Podman, image_name
from kube_pods import PREFIX, Object, rendered

pytestmark = [pytest.mark.images, pytest.mark.slow, pytest.mark.timeout(900)]

NETWORK = f"{PREFIX}prod"
SERVER = f"{PREFIX}reward"
SCORE = ("score", "--address", "reward:50053", "--prompt", "question 1? ", "--response", "yes")
STRICT = ("--pull=never", "--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--tmpfs=/tmp:rw,mode=1777")


def write_secret(folder: Path, authority: trustme.CA, names: list[str]) -> None:
    """A Secret as cert-manager makes it and a kubelet mounts it."""
    folder.mkdir()
    certificate = authority.issue_cert(*names)
    certificate.private_key_pem.write_to_path(folder / "tls.key")
    (folder / "tls.crt").write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
    authority.cert_pem.write_to_path(folder / "ca.crt")
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o755)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of certificates by the name of their Certificate; `stranger` is of an authority that nobody knows."""
    objects = rendered("prod")
    if objects is None:
        pytest.skip("neither kustomize nor kubectl is installed, so the overlay cannot be rendered")
    folder = tmp_path_factory.mktemp("secrets")
    authority = trustme.CA()
    for one in objects:
        if one["kind"] == "Certificate" and one["metadata"]["name"] in ("reward", "operator", "prometheus"):
            write_secret(folder / one["metadata"]["name"], authority, one["spec"]["dnsNames"])
    write_secret(folder / "stranger", trustme.CA(), ["operator"])
    authority.cert_pem.write_to_path(folder / "stranger" / "ca.crt")
    return folder


def write_settings(objects: list[Object], folder: Path) -> list[str]:
    """Writes what the pod of `reward` mounts, and returns its variables as options of podman."""
    found = {(one["kind"], one["metadata"]["name"]): one for one in objects}
    pod = found["Deployment", "reward"]["spec"]["template"]["spec"]
    for volume in pod["volumes"]:
        if "configMap" in volume:
            (folder / volume["name"]).mkdir()
            for name, text in found["ConfigMap", volume["configMap"]["name"]]["data"].items():
                (folder / volume["name"] / name).write_text(text)
    (container,) = pod["containers"]
    return [f"--env={one['name']}={one['value']}" for one in container["env"] if "value" in one]


@pytest.fixture(scope="module")
def prod(podman: Podman, models: Path, secrets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """Serves as `reward` on a network."""
    image = image_name("reward")
    if not podman.has(image):
        pytest.skip(f"{image} is not built: scripts/build_images.py reward --builder buildah")
    folder = tmp_path_factory.mktemp("settings")
    variables = write_settings(rendered("prod") or [], folder)
    if podman("network", "create", NETWORK).returncode:
        pytest.skip("podman makes no network here, so containers cannot reach each other")
    volumes = {
        folder / "settings": "/etc/steersman",
        folder / "callers": "/callers",
        secrets / "reward": "/tls",
        models: "/models",
    }
    mounts = [f"--volume={path}:{target}:ro" for path, target in volumes.items()]
    try:
        podman.output(
            "run",
            "--detach",
            f"--name={SERVER}",
            "--network-alias=reward",
            f"--network={NETWORK}",
            *STRICT,
            "--tmpfs=/data/runs:rw,mode=1777",
            *mounts,
            *variables,
            "--env=OMP_NUM_THREADS=1",
            image,
            "--config",
            "/etc/steersman/settings.yaml",
        )
        podman.wait_until_serving(SERVER)
        yield podman
    finally:
        podman("rm", "--force", "--time=0", SERVER)
        podman("network", "rm", "--force", NETWORK)


def call(podman: Podman, secret: Path | None) -> tuple[int, str]:
    """Scores with a certificate, or with none; exit status and what was printed."""
    mounts = [] if secret is None else [f"--volume={secret}:/tls:ro"]
    security = (
        ["--tls", "--ca-file=/tls/ca.crt", "--cert-file=/tls/tls.crt", "--key-file=/tls/tls.key"] if secret else []
    )
    run = ("run", "--rm", *STRICT, f"--network={NETWORK}", *mounts, image_name("client"))
    done = podman(*run, *security, *SCORE, "--timeout=10")
    return done.returncode, done.stdout + done.stderr


def test_the_operator_may_score(prod: Podman, secrets: Path) -> None:
    status, printed = call(prod, secrets / "operator")
    assert status == 0, printed
    assert isinstance(json.loads(printed)["score"], float)


@pytest.mark.parametrize(
    ("caller", "reason"), [("prometheus", "UNAUTHENTICATED"), ("stranger", "UNAVAILABLE"), (None, "UNAVAILABLE")]
)
def test_nobody_else_may(prod: Podman, secrets: Path, caller: str | None, reason: str) -> None:
    status, printed = call(prod, secrets / caller if caller else None)
    assert (status, reason in printed) == (1, True), printed
