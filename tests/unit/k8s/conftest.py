import sys
from pathlib import Path

import pytest

# Test modules are imported on their own.
sys.path.insert(0, str(Path(__file__).parent))

from overlays import OVERLAYS, Overlay, kustomize, render


@pytest.fixture(scope="session", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> Overlay:
    if kustomize() is None:
        pytest.skip("neither kustomize nor kubectl is installed, so no overlay can be rendered")
    return render(request.param)
