"""Jobs of several nodes: an Indexed Job and its headless Service, on a real API server with its controllers."""

from pathlib import Path

import pytest
import yaml
from control_plane import ControlPlane, Object, eventually, path_of
from launching import ONE, SEVERAL, Make, Runs, assert_holds, until, waiting_for
from nodes import Nodes

from steersman.cluster.port import JOBSETS
from steersman.trainer.jobs.kubernetes.launcher import KubernetesLauncher
from steersman.trainer.jobs.launcher import LaunchRefused, WorkerStatus
from steersman.trainer.jobs.model import JobKind, JobSpec

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "kubernetes-jobs.md"
COMPONENT = ROOT / "k8s" / "components" / "multi-node-trainer" / "kustomization.yaml"


@pytest.fixture
def services(accounts: ControlPlane, namespace: str) -> None:
    """The right that the component gives the trainer service."""
    (patch,) = yaml.safe_load(COMPONENT.read_text())["patches"]
    path = path_of("Role", namespace, "trainer")
    rules = accounts.admin.ask("GET", path)["rules"]
    rules += [one["value"] for one in yaml.safe_load(patch["patch"])]
    accounts.admin.merge(path, {"rules": rules})
    accounts.wait_for_right(namespace, "trainer", "", "services", "create")


def service(plane: ControlPlane, namespace: str) -> Object | None:
    return plane.admin.get(path_of("Service", namespace, ONE))


async def test_from_launch_to_end(
    services: None, launcher: KubernetesLauncher, accounts: ControlPlane, nodes: Nodes, run_of: Runs, namespace: str
) -> None:
    run = run_of(resources=SEVERAL)
    spec = JobSpec(kind=JobKind.PPO, config={}, resources=SEVERAL)
    described = list(yaml.safe_load_all(await launcher.describe(run, spec)))
    handle = await launcher.launch(run, SEVERAL)
    assert await launcher.launch(run, SEVERAL) == handle
    job, held = accounts.admin.ask("GET", path_of("Job", namespace, ONE)), service(accounts, namespace)
    assert held is not None
    for made, asked in zip((job, held), described, strict=True):
        assert_holds(made, asked)
    uid = job["metadata"]["uid"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": ONE, "uid": uid}
    assert held["metadata"]["ownerReferences"] == [owner]
    pods = [nodes.pod_of(ONE, index=index) for index in (0, 1)]
    for index, pod in enumerate(pods):
        # By this name the others find it.
        assert nodes.pod(pod)["spec"]["hostname"] == f"{ONE}-{index}"
        assert nodes.pod(pod)["spec"]["subdomain"] == ONE
        assert held["spec"]["selector"].items() <= nodes.pod(pod)["metadata"]["labels"].items()
    nodes.run(pods[0])
    assert pods[1] in await waiting_for(launcher, handle, pods[1])
    nodes.run(pods[1])
    assert await launcher.status(handle) == WorkerStatus(alive=True)
    # One fails; the Job controller ends the other, and only then is the job over.
    nodes.finish(pods[1], {"exitCode": 1, "reason": "Error", "message": "NCCL error"})
    eventually(lambda: nodes.pod(pods[0])["metadata"].get("deletionTimestamp"), "the other node is told to end")
    assert (await launcher.status(handle)).alive
    nodes.end(pods[0])
    status = await until(launcher, handle, lambda now: not now.alive)
    assert f"exited with status 1 in pod {pods[1]}" in status.ending
    assert "NCCL error" in status.ending


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_nothing_stays_behind(
    services: None,
    launcher: KubernetesLauncher,
    accounts: ControlPlane,
    nodes: Nodes,
    run_of: Runs,
    namespace: str,
    how: str,
) -> None:
    handle = await launcher.launch(run_of(resources=SEVERAL), SEVERAL)
    for index in (0, 1):
        nodes.pod_of(ONE, index=index)
    await (launcher.stop(handle) if how == "stop" else launcher.kill(handle))
    await until(launcher, handle, lambda now: not now.alive)
    eventually(lambda: service(accounts, namespace) is None, "the Service is collected")
    eventually(lambda: not nodes.pods(), "the pods are collected")


async def test_without_the_right_to_make_services_nothing_is_made(
    make_launcher: Make, accounts: ControlPlane, run_of: Runs, namespace: str
) -> None:
    with pytest.raises(LaunchRefused, match=r"resources: \['services'\], verbs: \['patch'\]"):
        await make_launcher().launch(run_of(resources=SEVERAL), SEVERAL)

    def is_taken_back() -> bool:
        return accounts.admin.get(path_of("Job", namespace, ONE)) is None

    eventually(is_taken_back, "the Job is taken back")


async def test_jobsets_without_their_controller(
    make_launcher: Make, accounts: ControlPlane, run_of: Runs, namespace: str
) -> None:
    """First the kind is not there, then nobody does anything for it."""
    launcher, run = make_launcher(jobset=True), run_of(resources=SEVERAL)
    # Whether there is such a kind, only who has the right to it is told.
    with pytest.raises(LaunchRefused, match=r"resources: \['jobsets'\], verbs: \['list'\]"):
        await launcher.launch(run, SEVERAL)
    path = path_of("Role", namespace, "trainer")
    (rule,) = (line for line in PAGE.read_text().splitlines() if "resources: [jobsets]" in line)
    rules = [*accounts.admin.ask("GET", path)["rules"], *yaml.safe_load(rule)]
    accounts.admin.merge(path, {"rules": rules})
    accounts.wait_for_right(namespace, "trainer", JOBSETS.group, JOBSETS.plural, "create")
    with pytest.raises(LaunchRefused, match="install the JobSet controller, or set kubernetes.jobset to false"):
        await launcher.launch(run, SEVERAL)
    accounts.define(JOBSETS.group, JOBSETS.version, "JobSet")
    handle = await launcher.launch(run, SEVERAL)
    assert handle.startswith(f"{namespace}/jobsets/{ONE}/")
    assert await launcher.launch(run, SEVERAL) == handle
    assert "JobSet steersman-one-1 has no pod yet" in (await launcher.status(handle)).waiting
    await launcher.stop(handle)
    status = await until(launcher, handle, lambda now: not now.alive)
    assert f"its JobSet {namespace}/{ONE} was deleted" in status.ending
