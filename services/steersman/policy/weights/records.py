"""What the store of weights is asked, and what it tells."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from steersman.policy.weights.manifest import TensorSpec
from steersman.wire.errors import invalid_field
from steersman.wire.identity import WeightVersion
from steersman.wire.weights.digest import DIGEST_BYTES

DEFAULT_IDLE_TIMEOUT_S: Final = 60.0
MIN_IDLE_TIMEOUT_S: Final = 1.0
MAX_IDLE_TIMEOUT_S: Final = 3600.0
_MAX_RUN_ID_CHARS: Final = 128


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A version, the digest of all its weights, and when it became active (seconds since the epoch)."""

    version: WeightVersion
    digest: bytes
    activated_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class BeginRequest:
    """What a push announces. `base_version` is what deltas apply to, and what a partial push leaves unsaid; `digest`
    may be empty.
    """

    version: WeightVersion
    tensors: Sequence[TensorSpec]
    base_version: WeightVersion | None = None
    partial: bool = False
    idle_timeout_s: float = DEFAULT_IDLE_TIMEOUT_S
    digest: bytes = b""

    def check(self) -> None:
        """Raises INVALID_FIELD naming what no push can announce."""
        _check_version(self.version)
        if self.digest:
            check_digest(self.digest)
        if not MIN_IDLE_TIMEOUT_S <= self.idle_timeout_s <= MAX_IDLE_TIMEOUT_S:
            allowed = f"[{MIN_IDLE_TIMEOUT_S:g} s, {MAX_IDLE_TIMEOUT_S:g} s]"
            raise invalid_field("idle_timeout", f"{self.idle_timeout_s:g} s", allowed)


@dataclass(frozen=True, kw_only=True)
class Switch:
    """How an activation or a rollback went. `push_s` is the time since its push began, for activations."""

    active: Snapshot
    pause_s: float = 0.0
    num_running_requests: int = 0
    push_s: float | None = None


def check_digest(digest: bytes) -> None:
    """Raises INVALID_FIELD unless it has the length of one."""
    if len(digest) != DIGEST_BYTES:
        raise invalid_field("digest", f"{len(digest)} bytes", f"{DIGEST_BYTES} bytes")


def _check_version(version: WeightVersion) -> None:
    run_id = version.run_id
    if not 0 < len(run_id) <= _MAX_RUN_ID_CHARS or not run_id.isprintable():
        raise invalid_field("version.run_id", run_id, f"1 to {_MAX_RUN_ID_CHARS} printable characters")
