import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

# Test modules are imported on their own; what they share with the tests against our own API server lies there.
sys.path.insert(0, str(Path(__file__).parents[2] / "unit" / "trainer" / "jobs_kubernetes"))
sys.path.insert(0, str(Path(__file__).parents[2] / "unit" / "trainer" / "discovery"))
sys.path.insert(0, str(Path(__file__).parents[2] / "unit" / "k8s"))
sys.path.insert(0, str(Path(__file__).parent))

from control_plane import SERVER, ControlPlane, find
from launching import Make, Runs, SignIn
from nodes import Nodes

from steersman.cluster import api as cluster
from steersman.cluster.settings import KubernetesSettings
from steersman.trainer.jobs.folder import JobFile, write_job_file
from steersman.trainer.jobs.kubernetes.launcher import KubernetesLauncher
from steersman.trainer.jobs.model import JobKind, JobResources, JobSpec

# Every look asks: no test waits for the next.
SETTINGS: dict[str, Any] = {"image": "trainer:1", "run_claim": "runs", "poll_seconds": 1e-9}
RBAC = Path(__file__).parents[3] / "k8s" / "base" / "trainer" / "rbac.yaml"
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """etcd and an API server."""
    if isinstance(why := find(*SERVER), str):
        pytest.skip(why)
    with ControlPlane(tmp_path_factory.mktemp("control-plane")) as running:
        yield running


@pytest.fixture
def controllers(plane: ControlPlane) -> ControlPlane:
    """The same with the controller manager."""
    plane.start_controllers()
    return plane


@pytest.fixture
def namespace(plane: ControlPlane) -> Iterator[str]:
    """A namespace of the test, as the base's."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/warn": "restricted"}
    with plane.namespace(f"test-{next(_numbers)}", labels) as name:
        yield name


@pytest.fixture
def accounts(controllers: ControlPlane, namespace: str) -> ControlPlane:
    """The accounts and rights of the base in the namespace: `trainer` and `training-job`."""
    objects = [one for one in yaml.safe_load_all(RBAC.read_text()) if one is not None]
    for one in objects:
        for subject in one.get("subjects", ()):
            subject["namespace"] = namespace
    controllers.make(namespace, *objects)
    controllers.wait_for_right(namespace, "trainer", "batch", "jobs", "create")
    controllers.wait_for_right(namespace, "training-job", "discovery.k8s.io", "endpointslices", "watch")
    return controllers


@pytest.fixture
def sign_in(plane: ControlPlane, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SignIn:
    """Clients that are made from now on are this account of the namespace."""
    path = tmp_path / "kubeconfig"
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    # Read by the client when it was imported.
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))

    def as_account(name: str) -> None:
        path.write_text(yaml.safe_dump(plane.kubeconfig(plane.token(namespace, name), namespace)))

    return as_account


@pytest.fixture
def nodes(accounts: ControlPlane, namespace: str) -> Nodes:
    """What runs pods of the namespace."""
    return Nodes(accounts, namespace)


@pytest.fixture
def make_launcher(accounts: ControlPlane, sign_in: SignIn) -> Iterator[Make]:
    """A launcher of the trainer service with these settings."""
    clients = []

    def make(account: str = "trainer", **settings: Any) -> KubernetesLauncher:
        sign_in(account)
        clients.append(cluster.connect(None, 20.0))
        return KubernetesLauncher(KubernetesSettings(**SETTINGS | settings), clients[-1], user=1000, group=1000)

    yield make
    for one in clients:
        one.close()


@pytest.fixture
def launcher(make_launcher: Make) -> KubernetesLauncher:
    return make_launcher()


@pytest.fixture
def run_of(tmp_path: Path) -> Runs:
    """The folder of a job."""

    def make(job_id: str = "one", resources: JobResources | None = None) -> Path:
        directory = tmp_path / "runs" / job_id
        directory.mkdir(parents=True, exist_ok=True)
        spec = JobSpec(kind=JobKind.PPO, config={}, resources=resources or JobResources(labels={"team": "a"}))
        write_job_file(directory, JobFile(job_id=job_id, spec=spec, database="../jobs.sqlite"))
        return directory

    return make
