"""What docs/kubernetes.md tells to type names what there is."""

import re
import shlex
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_health.v1 import health_pb2
from overlays import K8S

from steersman.v1 import reward_pb2

ROOT = K8S.parent
PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
CALLS = [shlex.split(line) for line in COMMANDS if line.startswith("grpcurl") and " -d " in line]


def test_files_are_there() -> None:
    # An overlay of one's own is not.
    named = {path for path in re.findall(r"\b(?:k8s|scripts|tests)/[\w./*-]*\w", PAGE) if "overlays/mine" not in path}
    assert len(named) > 8
    assert [path for path in named if not list(ROOT.glob(path))] == []
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[-1])
def test_bodies_of_calls_are_what_services_take(call: list[str]) -> None:
    assert reward_pb2.DESCRIPTOR.package
    assert health_pb2.DESCRIPTOR.package
    service, _, method = call[-1].partition("/")
    found = descriptor_pool.Default().FindServiceByName(service).methods_by_name[method]
    request = message_factory.GetMessageClass(found.input_type)()
    json_format.Parse(call[call.index("-d") + 1], request)


def test_there_are_calls() -> None:
    assert {call[-1] for call in CALLS} == {"grpc.health.v1.Health/Check", "steersman.v1.RewardService/Score"}


def test_options_of_the_command_exist() -> None:
    from typer.main import get_command

    from steersman.cli.main import app

    root = get_command(app)
    checked = 0
    for line in COMMANDS:
        if not line.startswith("steersman "):
            continue
        name, *arguments = shlex.split(line)[1:]
        command = root.get_command(None, name)  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {one for one in arguments if one.startswith("--")} <= known, line
        checked += 1
    assert checked >= 8


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_the_pod_for_models_is_as_strict_as_the_others(version: str) -> None:
    pod = yaml.safe_load((K8S / "models-pod.yaml").read_text())
    kubernetes_validate.validate(pod, version, strict=True)
    claims = yaml.safe_load_all((K8S / "base" / "storage" / "claims.yaml").read_text())
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] in {claim["metadata"]["name"] for claim in claims}
    (container,) = pod["spec"]["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    other = next(yaml.safe_load_all((K8S / "base" / "reward" / "deployment.yaml").read_text()))
    template = other["spec"]["template"]["spec"]
    assert pod["spec"]["securityContext"] == template["securityContext"]
    assert container["securityContext"] == template["containers"][0]["securityContext"]
    assert Path(ROOT / "docker" / "client.Dockerfile").exists()
