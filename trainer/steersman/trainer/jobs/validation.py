"""Checks the settings of a job in a process of its own.

The settings classes live beside the stages, which import torch: seconds and hundreds of megabytes that the service
should not carry. `python -m steersman.trainer.jobs.validation` reads {"kind", "config"} on standard input and writes
{"violations": [...]} on standard output.
"""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from steersman.trainer.jobs.model import JobKind
from steersman.trainer.jobs.registry import STAGES, Stages
from steersman.wire.errors import FieldViolation, Reason, SteersmanError

# Importing torch from a cold disk takes tens of seconds; callers of CreateJob wait for a minute.
TIMEOUT_SECONDS: Final = 50.0

CONFIG_PATH: Final = "spec.config"


class Validator(Protocol):
    """Checks settings before a job is accepted."""

    async def check(self, kind: JobKind, config: Mapping[str, Any]) -> None:
        """Returns if a stage of `kind` takes `config`. Errors: INVALID_FIELD with a violation for each bad setting."""


class ProcessValidator:
    """Checks each config in a short-lived process."""

    def __init__(
        self, command: Sequence[str] = (sys.executable, "-P", "-m", "steersman.trainer.jobs.validation")
    ) -> None:
        self._command = tuple(command)

    async def check(self, kind: JobKind, config: Mapping[str, Any]) -> None:
        """See `Validator`. Errors: also ENGINE_UNAVAILABLE if the process cannot answer."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, stderr=pipe)
        request = json.dumps({"kind": kind, "config": dict(config)}).encode()
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                answer, log = await process.communicate(request)
        except TimeoutError:
            raise _cannot_check(f"no answer in {TIMEOUT_SECONDS:.0f} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            raise _cannot_check(log.decode(errors="replace").strip().rpartition("\n")[2])
        violations = [FieldViolation(**violation) for violation in json.loads(answer)["violations"]]
        if violations:
            message = "; ".join(f"{violation.field} {violation.description}" for violation in violations[:5])
            raise SteersmanError(Reason.INVALID_FIELD, message, violations=violations)


def _cannot_check(why: str) -> SteersmanError:
    return SteersmanError(Reason.ENGINE_UNAVAILABLE, f"cannot check the settings of the job: {why}")


def find_violations(stages: Stages, kind: JobKind, config: Mapping[str, Any]) -> list[FieldViolation]:
    """One violation for each bad setting, with its path below `spec.config`."""
    from pydantic import ValidationError

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


def main(stages: Stages = STAGES) -> int:
    """Answers one request on standard input. Returns the exit status."""
    request = json.load(sys.stdin)
    # Libraries that greet on standard output while they import must not spoil the answer.
    answer, sys.stdout = sys.stdout, sys.stderr
    violations = find_violations(stages, JobKind(request["kind"]), request["config"])
    listed = [{"field": violation.field, "description": violation.description} for violation in violations]
    json.dump({"violations": listed}, answer)
    answer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
