"""The script that builds: what it asks of a builder. Whether images come of it, tests/integration/docker says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "build_images.py"


@pytest.fixture
def builder(tmp_path: Path) -> Path:
    """A `docker` that writes down what it is told, and fails for the image `reward`; nothing else is on the path."""
    program = tmp_path / "docker"
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"with open({str(tmp_path / 'told')!r}, 'a') as file:\n    file.write('\\x1f'.join(sys.argv[1:]) + '\\n')\n"
        "sys.exit(any('reward:' in one for one in sys.argv))\n"
    )
    program.chmod(0o755)
    return tmp_path


def build(path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    environment = {"PATH": str(path), "HOME": os.environ.get("HOME", "/")}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    told = path / "told"
    return done, [line.split("\x1f") for line in told.read_text().splitlines()] if told.exists() else []


def test_an_image_gets_its_file_its_name_and_what_is_passed_on(builder: Path) -> None:
    config = builder / "pip.conf"
    options = ("--prefix", "host/team", "--tag", "2", "--torch-index-url", "cpu", "--pip-config", str(config))
    done, told = build(builder, "client", "trainer", *options, "--", "--network", "host")
    assert done.returncode == 0, done.stderr
    assert [one[:3] for one in told] == [
        ["build", f"--file=docker/{name}.Dockerfile", f"--tag=host/team/{name}:2"] for name in ("client", "trainer")
    ]
    for one in told:
        assert one[-3:] == ["--network", "host", "."]
        assert {"--build-arg=TORCH_INDEX_URL=cpu", f"--secret=id=pip,src={config}"} <= set(one)
        assert not any(argument.startswith(("--build-arg=BASE_IMAGE", "--secret=id=ca")) for argument in one)


def test_without_names_all_that_run_on_cpu_are_built_until_one_fails(builder: Path) -> None:
    done, told = build(builder)
    assert done.returncode == 1
    assert "reward" in done.stderr
    built = [one[1].removeprefix("--file=docker/").removesuffix(".Dockerfile") for one in told]
    assert built == ["client", "policy-cpu", "reference", "reward"]


def test_an_unknown_image_is_refused(builder: Path) -> None:
    done, told = build(builder, "rewards")
    assert (done.returncode, told) == (2, [])
    assert "'rewards'" in done.stderr


def test_without_a_builder_it_says_which_there_could_be(tmp_path: Path) -> None:
    done, _ = build(tmp_path, "client")
    assert done.returncode == 1
    assert "none of docker, podman, buildah is installed" in done.stderr
