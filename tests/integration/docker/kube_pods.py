"""A rendered overlay as pods that `podman kube play` runs: Deployments, ConfigMaps and claims, and no more of it.

What differs from a cluster: a pod is called as its Service would be, and found by that name; probes are left to the
caller, since podman knows none of gRPC; workers of training jobs are processes of the trainer's container, since there
is no API server; an emptyDir is a volume of podman.
"""

import copy
import shutil
import subprocess
from typing import Any

import yaml
from containers import ROOT

Object = dict[str, Any]
# podman 4.3 knows no key of a claim but its name, and keeps volumes of all pods in one place.
PREFIX = "steersman-test-"


def rendered(overlay: str) -> list[Object] | None:
    """The objects of an overlay; None if nothing is here that renders it."""
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            folder = str(ROOT / "k8s" / "overlays" / overlay)
            done = subprocess.run([*command, folder], capture_output=True, text=True, timeout=60, check=True)
            return list(yaml.safe_load_all(done.stdout))
    return None


def config_maps(objects: list[Object]) -> list[Object]:
    """Those that pods mount, as they are."""
    return [_without_namespace(one) for one in objects if one["kind"] == "ConfigMap"]


def claims(objects: list[Object]) -> list[Object]:
    """Volumes, under names that nobody else has."""
    found = [_without_namespace(one) for one in objects if one["kind"] == "PersistentVolumeClaim"]
    for one in found:
        one["metadata"]["name"] = PREFIX + one["metadata"]["name"]
    return found


def pods(objects: list[Object]) -> list[Object]:
    """One of each Deployment."""
    return [_pod(copy.deepcopy(one)) for one in objects if one["kind"] == "Deployment"]


def _without_namespace(one: Object) -> Object:
    found = copy.deepcopy(one)
    del found["metadata"]["namespace"]
    return found


def _pod(deployment: Object) -> Object:
    name = deployment["metadata"]["name"]
    template = deployment["spec"]["template"]
    spec = template["spec"]
    if name == "trainer":
        _work_here(spec)
    # /dev/shm is there in every container of podman.
    renamed = {}
    spec["volumes"] = [volume for volume in spec["volumes"] if volume["name"] != "shm"]
    for volume in spec["volumes"]:
        if "emptyDir" in volume:
            renamed[volume["name"]] = volume["name"] = f"{PREFIX}{name}-{volume['name']}"
        if claim := volume.get("persistentVolumeClaim"):
            claim["claimName"] = PREFIX + claim["claimName"]
    for container in (*spec["containers"], *spec.get("initContainers", ())):
        container["image"] = f"localhost/{container['image']}"
        for key in ("startupProbe", "readinessProbe", "livenessProbe", "ports"):
            container.pop(key, None)
        container["env"] = [_variable(one, container) for one in container["env"]]
        mounts = [one for one in container["volumeMounts"] if one["name"] != "shm"]
        container["volumeMounts"] = [one | {"name": renamed.get(one["name"], one["name"])} for one in mounts]
    # `always`, or podman fails to remove one that has just ended.
    annotations = {"io.podman.annotations.init.container.type": "always"}
    metadata = {"name": name, "labels": template["metadata"]["labels"], "annotations": annotations}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _variable(variable: Object, container: Object) -> Object:
    value = variable["value"] if "value" in variable else container["resources"]["limits"]["cpu"]
    return {"name": variable["name"], "value": value}


def _work_here(spec: Object) -> None:
    """Gives the trainer service what the pods of its workers would have."""
    (container,) = spec["containers"]
    container["env"].append({"name": "STEERSMAN_LAUNCHER", "value": "local"})
    container["resources"]["limits"] = {"cpu": "1", "memory": "3Gi"}
    container["volumeMounts"].append({"name": "models", "mountPath": "/models"})
    spec["volumes"].append({"name": "models", "persistentVolumeClaim": {"claimName": "models"}})
