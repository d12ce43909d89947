"""The file of `steersman up`."""

from pathlib import Path

import pytest
import yaml

from steersman.cli import up_config
from steersman.cli.console import InputError
from steersman.wire.errors import Reason, SteersmanError


def load(tmp_path: Path, text: str) -> up_config.UpConfig:
    path = tmp_path / "up.yaml"
    path.write_text(text)
    return up_config.load(path)


def test_ports_default_by_kind_and_further_ones_get_free_ports(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        services:
          policy: {model: m}
          policy-2: {service: policy, model: m}
          judge: {service: reward, port: 7001, metrics_port: null}
          trainer:
        """,
    )
    assert (config.services["policy"].port, config.services["policy"].metrics_port) == (50051, 9051)
    second = config.services["policy-2"]
    assert second.port not in (0, 50051)
    assert second.metrics_port not in (None, 0, 9051)
    assert (config.services["judge"].port, config.services["judge"].metrics_port) == (7001, None)
    assert config.services["trainer"].port == 50054


def test_specs_carry_the_services_own_settings(tmp_path: Path) -> None:
    text = "services: {policy: {model: m, generation: {max_tokens: 4}, environment: {OMP_NUM_THREADS: 2}}}"
    (spec,) = load(tmp_path, text).specs(tmp_path)
    assert spec.name == "policy"
    assert spec.address == "127.0.0.1:50051"
    assert spec.command[1:4] == ("-m", "steersman.policy", "--config")
    assert spec.environment == {"OMP_NUM_THREADS": "2"}
    own = yaml.safe_load(Path(spec.command[4]).read_text())
    assert own == {
        "host": "127.0.0.1",
        "port": 50051,
        "metrics_port": 9051,
        "model": "m",
        "generation": {"max_tokens": 4},
    }


@pytest.mark.parametrize(
    ("text", "field", "part"),
    [
        ("", "(file)", "dict"),
        ("services: {}", "services", "at least 1"),
        ("services: {policy: {model: m}}\ngrace: 1", "grace", "no such setting"),
        ("services: {judge: {model: m}}", "services.judge.service", "'judge'"),
        ("services: {policy: {port: 70000}}", "services.policy.port", "70000"),
        ("services: {policy: m}", "(file)", "services.policy is 'm'"),
        ("services: {Policy: {service: policy}}", "services.Policy.[key]", "match"),
        ("services: {policy: {port: 7}, reward: {port: 7}}", "(file)", "services.reward.port is 7"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, text: str, field: str, part: str) -> None:
    with pytest.raises(SteersmanError) as caught:
        load(tmp_path, text)
    assert caught.value.reason is Reason.INVALID_FIELD
    found = {violation.field: violation.description for violation in caught.value.violations}
    assert part in found[field]


def test_a_file_that_is_no_yaml_or_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^\S+up.yaml:1:12: is not valid YAML: .*$"):
        load(tmp_path, "services: {")
    with pytest.raises(InputError, match="nested too deep"):
        load(tmp_path, "[" * 5000)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        up_config.load(tmp_path / "none.yaml")


def test_variables_that_would_override_every_service_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSMAN_PORT", "1")
    monkeypatch.setenv("STEERSMAN_LOG_LEVEL", "debug")
    up_config.forget_inherited_settings()
    import os

    assert "STEERSMAN_PORT" not in os.environ
    assert os.environ["STEERSMAN_LOG_LEVEL"] == "debug"
