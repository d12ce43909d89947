"""Overlays as a cluster would get them."""

import functools
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from steersman.policy.settings import PolicySettings
from steersman.reference.settings import ReferenceSettings
from steersman.reward.settings import RewardSettings
from steersman.serving.settings import ServerSettings
from steersman.trainer.jobs.settings import TrainerSettings

K8S = Path(__file__).resolve().parents[3] / "k8s"
OVERLAYS = ("dev", "gpu", "prod")
SETTINGS: dict[str, type[ServerSettings]] = {
    "policy": PolicySettings,
    "reference": ReferenceSettings,
    "reward": RewardSettings,
    "trainer": TrainerSettings,
}

Object = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """The objects of one."""

    name: str
    objects: tuple[Object, ...]

    def of(self, kind: str) -> dict[str, Object]:
        """Objects of a kind by name."""
        return {one["metadata"]["name"]: one for one in self.objects if one["kind"] == kind}

    def pods(self) -> dict[str, Object]:
        """Pod templates by the name of their Deployment."""
        return {name: one["spec"]["template"] for name, one in self.of("Deployment").items()}

    def server(self, name: str) -> Object:
        """The container of a Deployment that serves."""
        (found,) = self.pods()[name]["spec"]["containers"]
        return dict(found)

    def containers(self) -> Iterator[tuple[str, Object]]:
        """All containers, those that begin a pod included."""
        for name, pod in self.pods().items():
            for one in (*pod["spec"]["containers"], *pod["spec"].get("initContainers", ())):
                yield f"{name}/{one['name']}", one

    def settings_text(self, name: str) -> str:
        """The settings file that a server reads."""
        volumes = {one["name"]: one for one in self.pods()[name]["spec"]["volumes"]}
        config_map = self.of("ConfigMap")[volumes["settings"]["configMap"]["name"]]
        return str(config_map["data"]["settings.yaml"])

    def settings(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ServerSettings:
        """What the server makes of its file, its flags and its environment."""
        file = folder / "settings.yaml"
        file.write_text(self.settings_text(name))
        container = self.server(name)
        for variable in container["env"]:
            if "value" in variable:
                monkeypatch.setenv(variable["name"], variable["value"])
        (mount,) = [one for one in container["volumeMounts"] if one["name"] == "settings"]
        arguments = [one.replace(f"{mount['mountPath']}/settings.yaml", str(file)) for one in container["args"]]
        assert str(file) in arguments
        return SETTINGS[name].load(arguments)


def kustomize() -> list[str] | None:
    """The command that renders, or None if it is not here."""
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            return command
    return None


@functools.cache
def render(name: str) -> Overlay:
    """The objects of an overlay."""
    command = kustomize()
    assert command is not None
    done = subprocess.run(
        [*command, str(K8S / "overlays" / name)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return Overlay(name=name, objects=tuple(yaml.safe_load_all(done.stdout)))


def matches(selector: Object, labels: Object) -> bool:
    """Whether the equality part of a selector takes these labels; an empty one takes all."""
    return selector.items() <= labels.items()
