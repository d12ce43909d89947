"""Typed settings of a server: flags over `STEERSMAN_*` environment over a YAML file over defaults.

    --generation.max-tokens 64   STEERSMAN_GENERATION__MAX_TOKENS=64   generation: {max_tokens: 64}

Unknown flags and YAML keys are refused. The file is named by `--config` or `STEERSMAN_CONFIG`.
"""

import ipaddress
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from steersman.serving.security.tls import TlsSettings
from steersman.wire.limits import MAX_MESSAGE_BYTES

ENV_PREFIX = "STEERSMAN_"


class SettingsError(ValueError):
    """Settings that cannot be used; the message has one line for each bad setting."""


class ServerSettings(BaseSettings):
    """Settings that every server has. Services add their own fields in a subclass."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        protected_namespaces=(),
    )

    host: str = Field(
        "127.0.0.1", description="Address to listen on. Beyond loopback needs credentials: see tls and access_file."
    )
    port: int = Field(0, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="Port of the Prometheus endpoint; 0 takes a free one, none is off."
    )
    health_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of a second listener, in the clear, that answers grpc.health.v1/Check to everyone and "
        "nothing else, for probes: they speak no TLS, and must not wait behind callers. 0 is a free one, none is off.",
    )
    grace_seconds: float = Field(30.0, ge=0, le=3600, description="Time for in-flight calls after SIGTERM, in seconds.")
    health_interval_seconds: float = Field(
        1.0, gt=0, le=60, description="Time between two looks at the engine, in seconds."
    )
    max_message_bytes: int = Field(
        MAX_MESSAGE_BYTES, ge=1024, lt=2**31, description="Largest message accepted or sent, in bytes."
    )
    max_concurrent_rpcs: int = Field(
        2048, ge=1, description="Calls in flight at once; more are refused with RESOURCE_EXHAUSTED."
    )
    max_concurrent_rpcs_per_caller: int | None = Field(
        None, ge=1, description="Calls of one caller in flight at once; none is no bound of its own."
    )
    max_connection_age_seconds: float | None = Field(
        600.0,
        gt=0,
        le=86400,
        description="Connections are to be made anew after so long, so that callers find servers that were added; "
        "calls under way end in peace. None: never.",
    )
    keepalive_seconds: float = Field(
        20.0,
        ge=1,
        le=7200,
        description="A caller that is silent for so long is pinged, and its calls are ended if it does not answer in "
        "half of that.",
    )
    tls: TlsSettings | None = Field(None, description="TLS for every port of the server; none is in the clear.")
    metrics_in_clear: bool = Field(
        False, description="Serve metrics without TLS all the same, for a scraper that cannot; they hold no content."
    )
    access_file: Path | None = Field(
        None, description="YAML file of the callers, their tokens or certificates, and their roles; none lets all in."
    )
    insecure: bool = Field(False, description="Listen beyond loopback without credentials.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log level.")
    log_format: Literal["text", "json"] = Field("text", description="Log lines for people or for machines.")

    @field_validator("host")
    @classmethod
    def _host_is_an_address(cls, value: str) -> str:
        if value == "localhost":
            return "127.0.0.1"
        try:
            ipaddress.ip_address(value)
        except ValueError:
            raise ValueError("allowed: an IP address, or localhost") from None
        return value

    @model_validator(mode="after")
    def _beyond_loopback_takes_credentials(self) -> Self:
        if ipaddress.ip_address(self.host).is_loopback or self.insecure:
            return self
        knows_callers = self.access_file is not None or (self.tls is not None and self.tls.client_ca is not None)
        if self.tls is None or not knows_callers:
            raise ValueError(
                f"host {self.host} is reachable from outside; allowed: with tls and either access_file or "
                "tls.client_ca; on 127.0.0.1 or ::1; or with --insecure, where something else guards it"
            )
        return self

    @classmethod
    def load(cls, argv: Sequence[str] | None = None, *, program: str | None = None) -> Self:
        """Settings from flags (`sys.argv` if `argv` is None), environment and file. `program` names it in `--help`.

        Raises:
            SettingsError: naming each bad key, its value and what is allowed.
            SystemExit: for `--help` and for flags that do not exist.
        """
        arguments = list(argv) if argv is not None else None
        config, arguments = _take_config_flag(arguments)
        file_values = _read_yaml(config) if config else {}

        class WithSources(cls):  # type: ignore[misc,valid-type]
            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                flags: CliSettingsSource[Any] = CliSettingsSource(
                    settings_cls, cli_parse_args=arguments, cli_prog_name=program
                )
                return flags, env_settings, InitSettingsSource(settings_cls, init_kwargs=file_values)

        WithSources.__name__ = cls.__name__
        WithSources.__doc__ = cls.__doc__
        try:
            loaded = WithSources()
        except ValidationError as error:
            raise SettingsError(explain(error)) from None
        return cls.model_construct(_fields_set=loaded.model_fields_set, **dict(loaded))


def explain(error: ValidationError) -> str:
    """One line for each bad setting: its path, its value, what is allowed."""
    lines = []
    for detail in error.errors():
        path = ".".join(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            lines.append(f"{path}: no such setting")
        elif detail["type"] == "missing":
            lines.append(f"{path}: is required")
        elif path:
            lines.append(f"{path}: is {detail['input']!r}: {message}")
        else:
            lines.append(message)
    return "\n".join(lines)


def _take_config_flag(arguments: list[str] | None) -> tuple[str | None, list[str]]:
    """Splits `--config FILE` off the flags; the environment names the file if no flag does."""
    rest = list(sys.argv[1:] if arguments is None else arguments)
    config = os.environ.get(ENV_PREFIX + "CONFIG")
    for index, argument in enumerate(rest):
        if argument.startswith("--config="):
            return argument.split("=", 1)[1], rest[:index] + rest[index + 1 :]
        if argument == "--config":
            if index + 1 == len(rest):
                raise SettingsError("--config: is missing its value, allowed: the path of a YAML file")
            return rest[index + 1], rest[:index] + rest[index + 2 :]
    return config, rest


def _read_yaml(name: str) -> dict[str, Any]:
    path = Path(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"--config: cannot read {name}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"--config: {name} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"--config: {name} is a {type(values).__name__}, allowed: a mapping of settings")
    return values
