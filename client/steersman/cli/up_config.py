"""The file of `steersman up`: which services to run, each with the settings that it takes itself.

    services:
      policy: {model: runs/sft/model}                                  # port 50051
      policy-2: {service: policy, model: runs/sft/model, port: 50061}
      reward: {model: runs/reward/model, environment: {OMP_NUM_THREADS: "2"}}
      trainer: {runs_directory: runs}
    start_timeout_seconds: 300
    grace_seconds: 30

`service` (default: the key) and `environment` are read here; everything else goes into the service's own file, and the
service refuses what it does not know.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from steersman.cli import yaml_file
from steersman.cli.supervisor import ServiceSpec, free_port
from steersman.wire.errors import FieldViolation, Reason, SteersmanError

ServiceName = Literal["policy", "reference", "reward", "trainer"]

DEFAULT_PORTS: Final[dict[ServiceName, int]] = {
    "policy": 50051,
    "reference": 50052,
    "reward": 50053,
    "trainer": 50054,
}
DEFAULT_METRICS_PORTS: Final[dict[ServiceName, int]] = {
    service: port - 41000 for service, port in DEFAULT_PORTS.items()
}
# One value for all services: it would override the file of each.
_NOT_INHERITED: Final = ("STEERSMAN_CONFIG", "STEERSMAN_HOST", "STEERSMAN_PORT", "STEERSMAN_METRICS_PORT")

Key = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,39}$")]
Port = Annotated[int, Field(ge=0, le=65535)]


class ServiceEntry(BaseModel):
    """One service; what is not named here is its own setting."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    service: ServiceName
    host: str = "127.0.0.1"
    port: Port
    metrics_port: Port | None
    environment: dict[str, str | int | float] = {}

    def settings(self) -> dict[str, Any]:
        """What its own file holds."""
        return self.model_dump(exclude={"service", "environment"})


class UpConfig(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid")

    services: dict[Key, ServiceEntry] = Field(min_length=1)
    start_timeout_seconds: float = Field(300.0, gt=0, le=86400)
    grace_seconds: float = Field(30.0, ge=0, le=3600)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Default service and ports; the second of a kind gets free ones where it names none."""
        if not isinstance(values, dict) or not isinstance(values.get("services"), dict):
            return values
        seen: set[Any] = set()
        filled: dict[Any, Any] = {}
        for key, given in values["services"].items():
            if not isinstance(given, dict | None):
                raise ValueError(f"services.{key} is {given!r}, allowed: a mapping of settings")
            entry = dict(given or {})
            service = entry.setdefault("service", key)
            first = service not in seen
            seen.add(service)
            entry.setdefault("port", DEFAULT_PORTS.get(service, 0) if first else 0)
            entry.setdefault("metrics_port", DEFAULT_METRICS_PORTS.get(service) if first else 0)
            for name in ("port", "metrics_port"):
                if entry[name] == 0:
                    entry[name] = free_port(str(entry.get("host", "127.0.0.1")))
            filled[key] = entry
        return values | {"services": filled}

    @model_validator(mode="after")
    def _ports_differ(self) -> "UpConfig":
        owners: dict[int, str] = {}
        for key, entry in self.services.items():
            for name, port in (("port", entry.port), ("metrics_port", entry.metrics_port)):
                if port is None:
                    continue
                if port in owners:
                    raise ValueError(f"services.{key}.{name} is {port}, which services.{owners[port]} has already")
                owners[port] = f"{key}.{name}"
        return self

    def specs(self, folder: Path) -> list[ServiceSpec]:
        """What to run; writes the services' own files into `folder`."""
        specs = []
        for key, entry in self.services.items():
            path = folder / f"{key}.yaml"
            path.write_text(yaml.safe_dump(entry.settings()), encoding="utf-8")
            host = f"[{entry.host}]" if ":" in entry.host else entry.host
            specs.append(
                ServiceSpec.of(
                    entry.service,
                    ["--config", str(path)],
                    address=f"{host}:{entry.port}",
                    name=key,
                    environment={name: str(value) for name, value in entry.environment.items()},
                )
            )
        return specs


def forget_inherited_settings() -> None:
    """Removes variables from this process's environment that would override the file of every service."""
    for name in _NOT_INHERITED:
        os.environ.pop(name, None)


def load(path: Path) -> UpConfig:
    """Reads the file. Raises InputError if it is no YAML, INVALID_FIELD with a violation for each bad key."""
    try:
        return UpConfig.model_validate(yaml_file.read(path))
    except ValidationError as error:
        raise SteersmanError(Reason.INVALID_FIELD, f"{path} has bad settings", violations=explain(error)) from None


def explain(error: ValidationError) -> list[FieldViolation]:
    """One violation for each bad key: its path, its value, what is allowed."""
    violations = []
    for detail in error.errors():
        path = ".".join(str(part) for part in detail["loc"]) or "(file)"
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = "no such setting"
        elif detail["type"] not in ("missing", "value_error"):
            message = f"is {detail['input']!r}: {message}"
        violations.append(FieldViolation(field=path, description=message))
    return violations
