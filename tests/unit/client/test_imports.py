"""What importing the client costs: grpcio, protobuf and numpy, nothing heavier."""

import json
import subprocess
import sys

import pytest

HEAVY = {
    "torch", "vllm", "transformers", "typer", "rich", "pydantic", "pydantic_settings", "yaml", "prometheus_client",
    "grpc_status", "xxhash", "safetensors", "pyarrow", "fsspec",
}  # fmt: skip


def imported(module: str) -> set[str]:
    """Names of all modules that importing one brings in, in a fresh interpreter."""
    program = f"import json, sys, {module}; sys.stdout.write(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout))


def test_the_client_needs_grpc_protobuf_and_numpy_only() -> None:
    modules = imported("steersman.client")
    assert not HEAVY & {name.partition(".")[0] for name in modules}
    assert not any(name == "google.rpc" or name.startswith("google.rpc.") for name in modules)
    rooms = {name.split(".")[1] for name in modules if name.startswith("steersman.")}
    assert rooms == {"client", "wire", "v1"}


@pytest.mark.parametrize("module", ["steersman.cli.main", "steersman.cli.supervisor"])
def test_the_command_never_imports_what_the_services_need(module: str) -> None:
    modules = imported(module)
    assert not {"torch", "vllm", "transformers", "pydantic_settings"} & {name.partition(".")[0] for name in modules}
    rooms = {name.split(".")[1] for name in modules if name.startswith("steersman.")}
    assert rooms == {"cli", "client", "wire", "v1"}


def test_help_loads_neither_pydantic_nor_yaml() -> None:
    names = {name.partition(".")[0] for name in imported("steersman.cli.main")}
    assert not {"pydantic", "yaml"} & names
