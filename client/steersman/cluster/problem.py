"""A request to the API server that failed."""

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Asked:
    """What a request was about: its verb and resource as RBAC names them, and the object if it was about one."""

    verb: str
    resource: str
    name: str = ""


class ApiProblem(Exception):
    """A request to the API server that failed.

    Attributes:
        asked: what it was about, None if that goes without saying.
        status: of HTTP, or of the Status object in a watch; 0 if there was no answer.
        retry_after_seconds: what the server asks for, None if nothing.
    """

    def __init__(
        self, status: int, message: str, *, retry_after_seconds: float | None = None, asked: Asked | None = None
    ) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status = status
        self.asked = asked
        self.retry_after_seconds = retry_after_seconds


class NoCluster(Exception):
    """There is no way to an API server from here; the message says what was looked for."""


def problem_of(error: Any, asked: Asked | None = None) -> ApiProblem:
    """What an `ApiException` of the client says."""
    message = error.reason or "no reason"
    with suppress(ValueError, KeyError, TypeError):  # a proxy's page, or nothing: the reason must do
        message = json.loads(error.body)["message"] or message
    retry_after = (error.headers or {}).get("Retry-After", "")
    wait = float(retry_after) if retry_after.isdecimal() else None
    return ApiProblem(error.status or 0, message, retry_after_seconds=wait, asked=asked)
