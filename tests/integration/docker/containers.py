"""Containers by podman, as strict with them as the manifests are."""

import os
import shutil
import subprocess
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# What a machine without systemd, or whose limits may not be raised, needs.
_CAUTIOUS = """
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
START_SECONDS = 300


@dataclass(frozen=True, kw_only=True)
class Podman:
    """Runs `podman` with an environment in which it works here."""

    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """What a command ended with."""
        return subprocess.run(
            ["podman", *arguments],
            env=os.environ | self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def output(self, *arguments: str, timeout: float = 120) -> str:
        """What a command printed; it must succeed."""
        done = self(*arguments, timeout=timeout)
        assert done.returncode == 0, f"podman {' '.join(arguments)}: {done.stderr[-2000:]}"
        return done.stdout

    def has(self, image: str) -> bool:
        """Whether an image is here; none is ever pulled."""
        return self("image", "exists", image).returncode == 0

    def wait_until_serving(self, container: str) -> None:
        """Asks as a probe would: inside the container, with the command that is in every server's image."""
        end = time.monotonic() + START_SECONDS
        while True:
            done = self("exec", container, "python", "-m", "steersman.serving.health_check")
            if done.stdout == "SERVING\n":
                return
            running = self("inspect", "--format={{.State.Running}}", container).stdout.strip()
            if running != "true" or time.monotonic() > end:
                logs = self("logs", container)
                raise AssertionError(f"{container}: {done.stdout}{done.stderr}\n{(logs.stdout + logs.stderr)[-4000:]}")
            time.sleep(1)


def image_name(name: str) -> str:
    """An image as scripts/build_images.py names it with podman or buildah."""
    return f"localhost/steersman/{name}:{VERSION}"


def find_podman(folder: Path) -> Podman | str:
    """A podman that works, or why there is none. `folder` takes its configuration if it needs one."""
    if shutil.which("podman") is None:
        return "podman is not installed (apt-get install podman buildah runc)"
    image = image_name("client")
    if not Podman().has(image):
        return f"{image} is not built: scripts/build_images.py --builder buildah"
    (folder / "containers.conf").write_text(_CAUTIOUS)
    for environment in ({}, {"CONTAINERS_CONF": str(folder / "containers.conf")}):
        podman = Podman(environment=environment)
        tried = podman("run", "--rm", "--pull=never", "--network=none", "--read-only", image, "--version")
        if tried.returncode == 0:
            return podman
    return f"podman runs no containers here: {tried.stderr.strip()[-300:]}"
