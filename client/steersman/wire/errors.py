"""The one error type that crosses the wire, and its closed list of reasons.

Handlers raise `SteersmanError`; the server turns it into a canonical status with rich details, and the client turns
those back into the same `SteersmanError`. What `message` says is public; private detail belongs in the log.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Final


class Code(IntEnum):
    """Canonical status codes (google.rpc.Code)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Reason(StrEnum):
    """Why a call or an item failed: the names of `steersman.v1.ErrorReason` without their prefix."""

    INVALID_FIELD = "INVALID_FIELD"
    SEQUENCE_TOO_LONG = "SEQUENCE_TOO_LONG"
    TOKEN_OUT_OF_VOCABULARY = "TOKEN_OUT_OF_VOCABULARY"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    QUEUE_FULL = "QUEUE_FULL"
    ENGINE_UNAVAILABLE = "ENGINE_UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    NOT_FINITE = "NOT_FINITE"
    SCORER_FAILED = "SCORER_FAILED"
    WEIGHT_PUSH_IN_PROGRESS = "WEIGHT_PUSH_IN_PROGRESS"
    WEIGHT_PUSH_NOT_ACTIVE = "WEIGHT_PUSH_NOT_ACTIVE"
    WEIGHT_VERSION_STALE = "WEIGHT_VERSION_STALE"
    WEIGHT_BASE_MISMATCH = "WEIGHT_BASE_MISMATCH"
    WEIGHT_MANIFEST_MISMATCH = "WEIGHT_MANIFEST_MISMATCH"
    WEIGHT_CHUNK_INVALID = "WEIGHT_CHUNK_INVALID"
    WEIGHTS_INCOMPLETE = "WEIGHTS_INCOMPLETE"
    WEIGHT_DIGEST_MISMATCH = "WEIGHT_DIGEST_MISMATCH"
    WEIGHT_ACTIVATION_FAILED = "WEIGHT_ACTIVATION_FAILED"
    JOB_STATE = "JOB_STATE"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    INTERNAL = "INTERNAL"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    MODEL_STATE = "MODEL_STATE"


# Total over Reason; a test says so.
CODE_OF: Final[dict[Reason, Code]] = {
    Reason.INVALID_FIELD: Code.INVALID_ARGUMENT,
    Reason.SEQUENCE_TOO_LONG: Code.INVALID_ARGUMENT,
    Reason.TOKEN_OUT_OF_VOCABULARY: Code.INVALID_ARGUMENT,
    Reason.REQUEST_TOO_LARGE: Code.INVALID_ARGUMENT,
    Reason.NOT_FOUND: Code.NOT_FOUND,
    Reason.ALREADY_EXISTS: Code.ALREADY_EXISTS,
    Reason.QUEUE_FULL: Code.RESOURCE_EXHAUSTED,
    Reason.ENGINE_UNAVAILABLE: Code.UNAVAILABLE,
    Reason.DEADLINE_EXCEEDED: Code.DEADLINE_EXCEEDED,
    Reason.CANCELLED: Code.CANCELLED,
    Reason.NOT_FINITE: Code.INTERNAL,
    Reason.SCORER_FAILED: Code.INTERNAL,
    Reason.WEIGHT_PUSH_IN_PROGRESS: Code.ABORTED,
    Reason.WEIGHT_PUSH_NOT_ACTIVE: Code.FAILED_PRECONDITION,
    Reason.WEIGHT_VERSION_STALE: Code.FAILED_PRECONDITION,
    Reason.WEIGHT_BASE_MISMATCH: Code.FAILED_PRECONDITION,
    Reason.WEIGHT_MANIFEST_MISMATCH: Code.INVALID_ARGUMENT,
    Reason.WEIGHT_CHUNK_INVALID: Code.INVALID_ARGUMENT,
    Reason.WEIGHTS_INCOMPLETE: Code.FAILED_PRECONDITION,
    Reason.WEIGHT_DIGEST_MISMATCH: Code.DATA_LOSS,
    Reason.WEIGHT_ACTIVATION_FAILED: Code.INTERNAL,
    Reason.JOB_STATE: Code.FAILED_PRECONDITION,
    Reason.UNAUTHENTICATED: Code.UNAUTHENTICATED,
    Reason.PERMISSION_DENIED: Code.PERMISSION_DENIED,
    Reason.INTERNAL: Code.INTERNAL,
    Reason.UNIMPLEMENTED: Code.UNIMPLEMENTED,
    Reason.MODEL_STATE: Code.FAILED_PRECONDITION,
}


# An error travels in a trailer, and peers refuse trailers beyond 8 KiB (percent-encoding triples some). The names and
# values of a request that an error repeats are as long as the caller likes.
MAX_MESSAGE_BYTES: Final = 1000
MAX_VIOLATIONS: Final = 8
_MAX_FIELD_BYTES: Final = 100
_MAX_DESCRIPTION_BYTES: Final = 300


def _shorten(text: str, limit: int, *, keep: str = "") -> str:
    """The text in at most `limit` bytes of UTF-8, and without control characters (but those of `keep`): it goes into
    logs and onto terminals.
    """
    text = text[: limit + 1]
    if not text.isprintable():
        text = "".join(char if char.isprintable() or char in keep else "?" for char in text)
    raw = text.encode(errors="replace")
    return text if len(raw) <= limit else raw[: limit - 3].decode(errors="ignore") + "..."


@dataclass(frozen=True, kw_only=True)
class FieldViolation:
    """One bad field: its path (`sampling.temperature`), and its value with what is allowed. Both are shortened."""

    field: str
    description: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "field", _shorten(self.field, _MAX_FIELD_BYTES))
        object.__setattr__(self, "description", _shorten(self.description, _MAX_DESCRIPTION_BYTES))


class SteersmanError(Exception):
    """A failure with a public explanation.

    Attributes:
        reason: why, from the closed list; None when the peer sent no reason (a proxy, another server).
        code: the canonical status code.
        message: what happened, for the caller.
        violations: bad fields, if the request was bad.
        retry_after_seconds: when to try again, if the server said so.
    """

    def __init__(
        self,
        reason: Reason | None,
        message: str,
        *,
        code: Code | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        message = _shorten(message, MAX_MESSAGE_BYTES, keep="\n")
        super().__init__(message)
        self.reason = reason
        self.code = code if code is not None else CODE_OF[reason] if reason is not None else Code.UNKNOWN
        self.message = message
        self.violations = tuple(violations)[:MAX_VIOLATIONS]
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        return f"{self.reason or self.code.name}: {self.message}"


def invalid_field(field: str, value: object, allowed: str, *, reason: Reason = Reason.INVALID_FIELD) -> SteersmanError:
    """The error for a bad field: names the field, the value (shortened) and what is allowed."""
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    description = f"is {shown}, allowed: {allowed}"
    violation = FieldViolation(field=field, description=description)
    return SteersmanError(reason, f"{field} {description}", violations=[violation])


def not_found(what: str, name: str, known: Sequence[str] = ()) -> SteersmanError:
    """The error for an unknown name; tells up to ten known ones."""
    hint = f"; known: {', '.join(sorted(known)[:10])}" if known else ""
    return SteersmanError(Reason.NOT_FOUND, f"no {what} is called {name!r}{hint}")


def queue_full(what: str, limit: int, retry_after_seconds: float) -> SteersmanError:
    """The error for a full bounded queue, with the time after which to try again."""
    message = f"{what} is full ({limit}); try again in {retry_after_seconds:.2g} s"
    return SteersmanError(Reason.QUEUE_FULL, message, retry_after_seconds=retry_after_seconds)


def unavailable(message: str) -> SteersmanError:
    """The error for an engine that is starting, draining or dead."""
    return SteersmanError(Reason.ENGINE_UNAVAILABLE, message)
