import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

# Test modules are imported on their own.
sys.path.insert(0, str(Path(__file__).parent))

from containers import ROOT, Podman, find_podman

BUILD = "STEERSMAN_BUILD_IMAGES"


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    """A podman that runs containers here.

    With STEERSMAN_BUILD_IMAGES the images are built first. It holds options of scripts/build_images.py; `--` is none.
    """
    if options := os.environ.get(BUILD):
        command = [sys.executable, str(ROOT / "scripts" / "build_images.py"), *shlex.split(options)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = find_podman(tmp_path_factory.mktemp("podman"))
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of random weights, which the user of the containers can read."""
    folder = tmp_path_factory.mktemp("models")
    program = ROOT / "k8s" / "overlays" / "dev" / "tiny_models.py"
    subprocess.run([sys.executable, str(program), str(folder)], check=True, timeout=300, capture_output=True)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder
