"""Checks the settings of a job before it is accepted. The settings classes import none of what the stages import."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final, Protocol

from pydantic import ValidationError

from steersman.trainer.jobs.model import JobKind
from steersman.trainer.jobs.registry import STAGES, Stages
from steersman.wire.errors import FieldViolation, Reason, SteersmanError

CONFIG_PATH: Final = "spec.config"


class Validator(Protocol):
    """Checks settings before a job is accepted."""

    async def check(self, kind: JobKind, config: Mapping[str, Any]) -> None:
        """Returns if a stage of `kind` takes `config`. Errors: INVALID_FIELD with a violation for each bad setting."""


class SettingsValidator:
    """Checks a config against the settings class of its stage."""

    def __init__(self, stages: Stages = STAGES) -> None:
        self._stages = stages

    async def check(self, kind: JobKind, config: Mapping[str, Any]) -> None:
        """See `Validator`."""
        # A config may be megabytes long: other calls go on meanwhile.
        violations = await asyncio.to_thread(find_violations, self._stages, kind, config)
        if violations:
            message = "; ".join(f"{violation.field} {violation.description}" for violation in violations[:5])
            raise SteersmanError(Reason.INVALID_FIELD, message, violations=violations)


def find_violations(stages: Stages, kind: JobKind, config: Mapping[str, Any]) -> list[FieldViolation]:
    """One violation for each bad setting, with its path below `spec.config`."""
    try:
        stages[kind].load_config_class().model_validate(dict(config))
    except ValidationError as error:
        return [
            FieldViolation(
                field=".".join([CONFIG_PATH, *(str(part) for part in detail["loc"])]),
                description=_describe(detail["type"], detail["msg"], detail["input"]),
            )
            for detail in error.errors()
        ]
    return []


def _describe(type_name: str, message: str, value: object) -> str:
    match type_name:
        case "extra_forbidden":
            return "is no setting of this kind of job"
        case "missing":
            return "is required"
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return f"is {shown}: {message.removeprefix('Value error, ')}"
