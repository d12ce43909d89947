"""Callers, how they are known, and what they may do: one YAML file, read again when it changes.

    callers:
      - name: trainer
        token_sha256: 9f86d081...       # of the token; the token itself is nowhere but with the caller
        roles: [generate, logprobs, score, push_weights]
      - name: dashboards
        certificate: dashboards.example  # common name, or a DNS or URI name, of the client certificate
        roles: []

Invariants:

- A caller is known by the digest of its token or by a name in a certificate that TLS has verified, never by what it
  says of itself.
- A file that cannot be read any more, or no longer parses, changes nothing: the last good list stays, and the log says
  so.
- Tokens are compared by digest, so that the time it takes tells nothing about a token.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steersman.serving.security.roles import ROLE_OF
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.roles import Role

logger = logging.getLogger(__name__)

# Between two looks at the file.
_LOOK_SECONDS: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Somebody who is known."""

    name: str
    roles: frozenset[Role]


class CallerEntry(BaseModel):
    """One caller of the file."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=128)
    token_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    certificate: str | None = Field(default=None, min_length=1)
    roles: list[Role]

    @model_validator(mode="after")
    def _known_by_something(self) -> "CallerEntry":
        if self.token_sha256 is None and self.certificate is None:
            raise ValueError("allowed: token_sha256, certificate, or both")
        return self


class AccessFile(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid")

    callers: list[CallerEntry] = Field(min_length=1)

    @model_validator(mode="after")
    def _each_once(self) -> "AccessFile":
        for field in ("name", "token_sha256", "certificate"):
            values = [value for entry in self.callers if (value := getattr(entry, field)) is not None]
            if twice := {value for value in values if values.count(value) > 1}:
                raise ValueError(f"{field} {sorted(twice)[0]!r} is there twice, allowed: each once")
        return self


class AccessList:
    """The callers of one file. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError saying what is wrong with the file."""
        self._path = path
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._stamp = _stamp(path)
        self._take(_read(path))

    def find(self, token: str | None, certificate_names: Iterable[str]) -> Caller | None:
        """Who holds this token, or else one of these names; None if nobody does."""
        self._refresh()
        if token is not None:
            return self._by_token.get(hashlib.sha256(token.encode()).hexdigest())
        for name in certificate_names:
            if (caller := self._by_certificate.get(name)) is not None:
                return caller
        return None

    def _refresh(self) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._looked < _LOOK_SECONDS:
                return
            self._looked = now
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            try:
                self._take(_read(self._path))
            except ValueError as error:
                logger.error("the list of callers stays as it was: %s", error)
            else:
                logger.info("callers read again", extra={"file": str(self._path)})

    def _take(self, file: AccessFile) -> None:
        callers = [(entry, Caller(name=entry.name, roles=frozenset(entry.roles))) for entry in file.callers]
        self._by_token = {entry.token_sha256: caller for entry, caller in callers if entry.token_sha256}
        self._by_certificate = {entry.certificate: caller for entry, caller in callers if entry.certificate}


def authorize(method: str, caller: Caller | None) -> Caller:
    """The caller, if the method is for it.

    Raises UNAUTHENTICATED if nobody is known, PERMISSION_DENIED naming the role that is missing.
    """
    if caller is None:
        message = "the call has no token and no client certificate that is known here"
        raise SteersmanError(Reason.UNAUTHENTICATED, message)
    if method not in ROLE_OF:
        raise SteersmanError(Reason.PERMISSION_DENIED, f"{method} is open to nobody")
    role = ROLE_OF[method]
    if role is not None and role not in caller.roles:
        raise SteersmanError(
            Reason.PERMISSION_DENIED, f"{caller.name} lacks the role {role.value}, which {method} needs"
        )
    return caller


def bearer_token(authorization: str | None) -> str | None:
    """The token of an `authorization` header; None without one. An empty one is a token too, of nobody."""
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()  # follows the links that Kubernetes swaps when a secret changes
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> AccessFile:
    try:
        return AccessFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"access_file: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"access_file: {path} is not YAML: {error}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ValueError(f"access_file: {path}: {problems}") from None
