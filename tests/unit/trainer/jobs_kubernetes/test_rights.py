"""The Roles of the manifests hold what is asked of the API server, and nothing else."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from job_api_server import JobApiServer

from steersman.cluster.api import connect
from steersman.cluster.settings import KubernetesSettings
from steersman.trainer.jobs.folder import JobFile, write_job_file
from steersman.trainer.jobs.kubernetes.launcher import KubernetesLauncher
from steersman.trainer.jobs.launcher import LogPart
from steersman.trainer.jobs.model import JobKind, JobResources, JobSpec

K8S = Path(__file__).resolve().parents[4] / "k8s"
DOCS = K8S.parent / "docs" / "kubernetes-jobs.md"
Rights = set[tuple[str, str, str]]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobApiServer]:
    with JobApiServer() as running:
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(running.kubeconfig()))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        # Read by the client when it was imported.
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        yield running


def rights(rules: list[dict[str, Any]]) -> Rights:
    """Group, resource and verb of each right."""
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def base_role(name: str) -> Rights:
    documents = yaml.safe_load_all((K8S / "base" / "trainer" / "rbac.yaml").read_text())
    (role,) = (one for one in documents if (one["kind"], one["metadata"]["name"]) == ("Role", name))
    return rights(role["rules"])


def component_role() -> Rights:
    component = yaml.safe_load((K8S / "components" / "multi-node-trainer" / "kustomization.yaml").read_text())
    (patch,) = component["patches"]
    assert patch["target"] == {"kind": "Role", "name": "trainer"}
    return rights([one["value"] for one in yaml.safe_load(patch["patch"])])


async def everything(server: JobApiServer, runs: Path, *, nodes: int, jobset: bool = False) -> Rights:
    """Does all that the launcher can do to a job."""
    settings = KubernetesSettings(image="trainer:1", run_claim="runs", poll_seconds=1e-9, jobset=jobset)
    api = connect(None, 5.0)
    launcher = KubernetesLauncher(settings, api, user=1000, group=1000)
    resources = JobResources(num_processes=nodes, processes_per_node=1)
    run = runs / "one"
    run.mkdir()
    spec = JobSpec(kind=JobKind.SFT, config={}, resources=resources)
    write_job_file(run, JobFile(job_id="one", spec=spec, database="../jobs.sqlite"))
    handle = await launcher.launch(run, resources)
    assert await launcher.launch(run, resources) == handle
    assert (await launcher.status(handle)).waiting  # from the events of the Job
    pod = server.add_pod("steersman-one-1", {"phase": "Pending"}, index=0)
    assert (await launcher.status(handle)).waiting  # from those of its pod
    server.log(pod, "a line")
    assert (await launcher.read_log(handle, run, LogPart())).lines == ["a line"]
    await launcher.stop(handle)
    await launcher.kill(handle)
    api.close()
    return server.rights


async def test_of_a_job_on_one_node(server: JobApiServer, tmp_path: Path) -> None:
    assert await everything(server, tmp_path, nodes=1) == base_role("trainer")


async def test_of_a_job_on_several(server: JobApiServer, tmp_path: Path) -> None:
    assert await everything(server, tmp_path, nodes=2) == base_role("trainer") | component_role()


async def test_of_a_jobset_they_are_those_that_the_page_names(server: JobApiServer, tmp_path: Path) -> None:
    asked = {right for right in await everything(server, tmp_path, nodes=2, jobset=True) if right[1] == "jobsets"}
    (rule,) = (line for line in DOCS.read_text().splitlines() if "resources: [jobsets]" in line)
    assert asked == rights(yaml.safe_load(rule))


def test_the_page_shows_the_role_of_the_manifests() -> None:
    page = DOCS.read_text()
    block = page[page.index("kind: Role\n") :].partition("```")[0]
    assert rights(yaml.safe_load(block)["rules"]) == base_role("trainer")
