"""Settings, the environment of the engine, and what checkpoint files say."""

import json
import os
from pathlib import Path

import pytest

from steersman.policy.engine import model_files
from steersman.policy.engine.options import EngineOptions, prepare_environment
from steersman.policy.settings import PolicySettings
from steersman.serving import vllm_environment
from steersman.serving.location import Location
from steersman.serving.settings import SettingsError


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An empty environment that the code under test writes to."""
    fake: dict[str, str] = {}
    monkeypatch.setattr(vllm_environment.os, "environ", fake)
    return fake


def test_cpu_engines_get_their_threads_and_no_compiler(environment: dict[str, str]) -> None:
    prepare_environment(EngineOptions(model=Path("m")), on_cpu=True)
    assert environment["TORCHDYNAMO_DISABLE"] == "1"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environment["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert environment["VLLM_NO_USAGE_STATS"] == "1"


def test_what_is_set_already_wins_over_defaults_but_not_over_options(environment: dict[str, str]) -> None:
    environment.update(OMP_NUM_THREADS="7", DO_NOT_TRACK="0")
    prepare_environment(EngineOptions(model=Path("m")), on_cpu=True)
    assert (environment["OMP_NUM_THREADS"], environment["DO_NOT_TRACK"]) == ("7", "0")
    prepare_environment(EngineOptions(model=Path("m"), num_threads=3, separate_worker=True), on_cpu=True)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"


def test_gpu_engines_are_left_alone(environment: dict[str, str]) -> None:
    prepare_environment(EngineOptions(model=Path("m")), on_cpu=False)
    assert "OMP_NUM_THREADS" not in environment
    assert "TORCHDYNAMO_DISABLE" not in environment


def test_settings_reach_the_engine(tmp_path: Path) -> None:
    flags = ["--model", str(tmp_path), "--kv-cache-mib", "3", "--max-num-seqs", "9", "--dtype", "float32"]
    settings = PolicySettings.load([*flags, "--served-model-name", "m", "--kv-cache-policy", "recompute"])
    found = settings.engine_options(Location(folder=tmp_path, name="other"), on_cpu=True)
    assert (found.model, found.kv_cache_bytes, found.max_num_seqs) == (tmp_path, 3 * 2**20, 9)
    assert (found.dtype, found.served_name) == ("float32", "m")
    assert settings.kv_cache_policy == "recompute"


def test_the_cache_is_bounded_on_cpu_only(tmp_path: Path) -> None:
    settings = PolicySettings.load(["--model", str(tmp_path)])
    location = Location(folder=tmp_path, name="org/name")
    assert settings.engine_options(location, on_cpu=True).kv_cache_bytes == 2**30
    assert settings.engine_options(location, on_cpu=False).kv_cache_bytes is None
    assert settings.engine_options(location, on_cpu=True).served_name == "org/name"


def test_the_ports_are_the_documented_ones() -> None:
    settings = PolicySettings.load(["--model", "m"])
    assert (settings.port, settings.metrics_port) == (50051, 9051)


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ([], "model"),
        (["--model", "m", "--max-num-seqs", "0"], "max_num_seqs"),
        (["--model", "m", "--dtype", "int3"], "dtype"),
        (["--model", "m", "--kv-cache-policy", "forget"], "kv_cache_policy"),
        (["--model", "m", "--gpu-memory-fraction", "1.5"], "gpu_memory_fraction"),
    ],
)
def test_bad_settings_are_named(flags: list[str], field: str) -> None:
    with pytest.raises(SettingsError, match=field):
        PolicySettings.load(flags)


def write(folder: Path, name: str, **content: object) -> None:
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(("value", "expected"), [(2, (2,)), ([9, 2], (2, 9)), (None, ())])
def test_end_of_sequence_ids(tmp_path: Path, value: object, expected: tuple[int, ...]) -> None:
    write(tmp_path, "config.json", eos_token_id=value)
    assert model_files.eos_token_ids(tmp_path) == expected


def test_the_generation_config_goes_first(tmp_path: Path) -> None:
    write(tmp_path, "config.json", eos_token_id=2)
    write(tmp_path, "generation_config.json", eos_token_id=[5, 4])
    assert model_files.eos_token_ids(tmp_path) == (4, 5)
    assert model_files.eos_token_ids(tmp_path / "nothing") == ()


def test_the_dtype_is_the_checkpoints_own(tmp_path: Path) -> None:
    assert model_files.dtype(tmp_path) == "auto"
    write(tmp_path, "config.json", dtype="float32")
    assert model_files.dtype(tmp_path) == "float32"
    write(tmp_path, "config.json", torch_dtype="torch.bfloat16")
    assert model_files.dtype(tmp_path) == "bfloat16"


def test_a_tokenizer_is_found(tmp_path: Path) -> None:
    assert not model_files.has_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    assert model_files.has_tokenizer(tmp_path)
