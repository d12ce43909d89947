import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test modules are imported on their own; what they share with the tests against our own API server lies there.
sys.path.insert(0, str(Path(__file__).parents[2] / "unit" / "trainer" / "jobs_kubernetes"))
sys.path.insert(0, str(Path(__file__).parents[2] / "unit" / "k8s"))
sys.path.insert(0, str(Path(__file__).parent))

from control_plane import SERVER, ControlPlane, find

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
