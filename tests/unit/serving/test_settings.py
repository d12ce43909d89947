"""Precedence, strictness and error texts of server settings."""

from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from steersman.serving.settings import ServerSettings, SettingsError


class Nested(BaseModel, extra="forbid"):
    max_tokens: int = Field(8, ge=1)


class ExampleSettings(ServerSettings):
    model: str = "none"
    generation: Nested = Nested()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("port: 1111\nmodel: from-file\ngeneration: {max_tokens: 3}\n")
    return path


def test_flags_over_environment_over_file_over_default(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSMAN_PORT", "2222")
    monkeypatch.setenv("STEERSMAN_LOG_LEVEL", "debug")
    settings = ExampleSettings.load([f"--config={config}", "--port", "3333"])
    assert (settings.port, settings.model, settings.log_level) == (3333, "from-file", "debug")
    assert settings.generation.max_tokens == 3
    assert settings.grace_seconds == 30


def test_environment_over_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSMAN_CONFIG", str(config))
    monkeypatch.setenv("STEERSMAN_GENERATION__MAX_TOKENS", "5")
    settings = ExampleSettings.load([])
    assert (settings.port, settings.generation.max_tokens) == (1111, 5)


def test_nested_flags() -> None:
    assert ExampleSettings.load(["--generation.max-tokens", "7"]).generation.max_tokens == 7


def test_loaded_settings_are_of_the_asked_class() -> None:
    assert type(ExampleSettings.load([])) is ExampleSettings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 1", "prot: no such setting"),
        ("port: 99999", "port: is 99999: .*65535"),
        ("generation: {max_tokens: 0}", r"generation.max_tokens: is 0: .*greater than or equal to 1"),
        ("- a", "is a list, allowed: a mapping"),
        ("a: [", "is not valid YAML"),
        ("host: example.org", "host: is 'example.org': allowed: an IP address"),
        ("host: 0.0.0.0", "reachable from outside"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=said):
        ExampleSettings.load(["--config", str(path)])


def test_all_bad_settings_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("port: -1\nlog_level: loud\n")
    with pytest.raises(SettingsError) as caught:
        ExampleSettings.load(["--config", str(path)])
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["port", "log_level"]


def test_missing_file() -> None:
    with pytest.raises(SettingsError, match="cannot read nowhere.yaml: No such file"):
        ExampleSettings.load(["--config", "nowhere.yaml"])


def test_config_without_value() -> None:
    with pytest.raises(SettingsError, match="allowed: the path of a YAML file"):
        ExampleSettings.load(["--config"])


def test_beyond_loopback_when_told() -> None:
    assert ExampleSettings.load(["--host", "0.0.0.0", "--insecure"]).host == "0.0.0.0"


def test_unknown_flags_are_refused() -> None:
    with pytest.raises((SystemExit, SettingsError)):
        ExampleSettings.load(["--prot", "1"])
