"""Rules of the house that no linter knows."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = ("client", "services", "trainer")


@pytest.mark.parametrize("root", SOURCE_ROOTS)
def test_steersman_is_a_namespace_shared_by_three_roots(root: str) -> None:
    assert (ROOT / root / "steersman").is_dir()
    assert not (ROOT / root / "steersman" / "__init__.py").exists()


def test_every_package_below_says_what_it_is() -> None:
    for root in SOURCE_ROOTS:
        for module in (ROOT / root / "steersman").rglob("*.py"):
            init = module.parent / "__init__.py"
            assert init.exists(), f"{module.parent} has no __init__.py"
            assert init.read_text().startswith('"""'), f"{init} has no docstring"


def test_stubs_are_those_of_the_protos() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "generate_stubs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_light_side_pulls_in_nothing_heavy() -> None:
    program = """
import sys
import steersman.client, steersman.wire.tensors, steersman.v1.trainer_pb2_grpc
heavy = {"torch", "vllm", "transformers", "pydantic", "typer", "rich", "yaml", "google.rpc"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_command_pulls_in_nothing_heavy() -> None:
    program = """
import sys
import steersman.cli.main
heavy = {"torch", "vllm", "transformers"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_nothing_pickles() -> None:
    for root in SOURCE_ROOTS:
        for module in (ROOT / root).rglob("*.py"):
            text = module.read_text()
            for word in ("import pickle", "torch.save(", "torch.load(", "allow_pickle=True", "pickle.loads"):
                assert word not in text, f"{module} has {word}"
