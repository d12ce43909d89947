"""The overlays as a real API server takes them: strictly, without a warning, and twice the same.

Kinds that are not Kubernetes' own have definitions of the test, which take any field; what cert-manager and the
Prometheus operator make of them is not seen here. There are no nodes.
"""

import copy
import json
from collections.abc import Iterator
from typing import Any, Final

import pytest
import yaml
from control_plane import ControlPlane, Object
from overlays import K8S, OVERLAYS, render

BASE: Final = "steersman"
SHIPPED: Final = {"cert-manager.io", "monitoring.coreos.com"}
APPLY: Final = ("apply", "--server-side", "--validate=strict", "--warnings-as-errors", "-o", "json", "-f", "-")
TRY: Final = (*APPLY[:-2], "--dry-run=server", *APPLY[-2:])


def in_namespace(objects: list[Object], name: str) -> list[Object]:
    """The same in another namespace."""
    moved = copy.deepcopy(objects)
    for one in moved:
        if one["kind"] == "Namespace":
            one["metadata"]["name"] = name
        if "namespace" in one["metadata"]:
            assert one["metadata"]["namespace"] == BASE
            one["metadata"]["namespace"] = name
        for subject in one.get("subjects", ()):
            subject["namespace"] = name
    return moved


@pytest.fixture(scope="module")
def definitions(plane: ControlPlane) -> None:
    """The kinds that overlays use and Kubernetes has not."""
    kinds = {(*one["apiVersion"].split("/"), one["kind"]) for name in OVERLAYS for one in render(name).objects}
    foreign = sorted(one for one in kinds if one[0] in SHIPPED)
    assert foreign
    for group, version, kind in foreign:
        plane.define(group, version, kind)


@pytest.fixture(scope="module", params=OVERLAYS)
def applied(
    request: pytest.FixtureRequest, plane: ControlPlane, definitions: None
) -> Iterator[tuple[str, list[Object]]]:
    """A namespace with an overlay in it, and what the API server made of it."""
    objects = in_namespace(list(render(request.param).objects), f"overlay-{request.param}")
    first = plane.kubectl(*APPLY, documents=objects)
    assert first.returncode == 0, first.stderr
    yield f"overlay-{request.param}", json.loads(first.stdout)["items"]
    plane.admin.ask("DELETE", f"/api/v1/namespaces/overlay-{request.param}")


def test_an_overlay_applied_again_changes_nothing(plane: ControlPlane, applied: tuple[str, list[Object]]) -> None:
    name, first = applied
    rendered = render(name.removeprefix("overlay-")).objects
    again = plane.kubectl(*APPLY, documents=in_namespace(list(rendered), name))
    assert again.returncode == 0, again.stderr
    assert contents(json.loads(again.stdout)["items"]) == contents(first)
    assert len(first) == len(rendered)


def contents(objects: list[Object]) -> list[Object]:
    """What is in them. Without the version: of a claim the API server writes the same once more."""
    held = copy.deepcopy(objects)
    for one in held:
        del one["metadata"]["resourceVersion"]
        for manager in one["metadata"].get("managedFields", ()):
            del manager["time"]
    return held


def pods(name: str) -> dict[str, Object]:
    """A pod of each Deployment in a namespace."""
    templates = render(name.removeprefix("overlay-")).pods()
    return {
        one: {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": template["metadata"] | {"name": one, "namespace": name},
            "spec": template["spec"],
        }
        for one, template in templates.items()
    }


def test_pods_of_every_deployment_are_admitted(plane: ControlPlane, applied: tuple[str, list[Object]]) -> None:
    name, _ = applied
    admitted = plane.kubectl(*TRY, documents=list(pods(name).values()))
    assert admitted.returncode == 0, admitted.stderr
    items: list[Any] = json.loads(admitted.stdout)["items"]
    assert len(items) == 4
    for one in items:
        assert one["spec"].get("priority", 0) == (0 if name == "overlay-dev" else 1000)


def test_a_pod_with_a_restriction_less_is_refused(plane: ControlPlane, applied: tuple[str, list[Object]]) -> None:
    name, _ = applied
    pod = pods(name)["trainer"]
    del pod["spec"]["containers"][0]["securityContext"]["capabilities"]
    refused = plane.kubectl(*TRY, documents=[pod])
    assert refused.returncode != 0
    assert 'violates PodSecurity "restricted:latest": unrestricted capabilities' in refused.stderr


def test_the_pod_for_models_is_admitted(plane: ControlPlane, applied: tuple[str, list[Object]]) -> None:
    name, _ = applied
    pod = in_namespace([yaml.safe_load((K8S / "models-pod.yaml").read_text())], name)
    # It names no account: the controller manager makes the default one.
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": name}}
    assert plane.kubectl(*APPLY, documents=[account]).returncode == 0
    done = plane.kubectl(*APPLY, documents=pod)
    assert done.returncode == 0, done.stderr
    again = plane.kubectl(*APPLY, documents=pod)
    assert contents([json.loads(again.stdout)]) == contents([json.loads(done.stdout)])
