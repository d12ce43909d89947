"""What a publisher needs of a replica, so that tests can stand in for it, and what it says of one that is past help."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final, Protocol

from steersman.client.types import (
    Activation,
    KvCachePolicy,
    Push,
    PushReceipt,
    RelayHop,
    TensorSpec,
    WeightChunk,
    WeightSnapshot,
    WeightState,
)
from steersman.wire.errors import Reason
from steersman.wire.identity import WeightVersion

FINAL_REFUSALS: Final = frozenset(
    {
        Reason.WEIGHT_VERSION_STALE,
        Reason.WEIGHT_MANIFEST_MISMATCH,
        Reason.INVALID_FIELD,
        Reason.UNIMPLEMENTED,
        Reason.UNAUTHENTICATED,
        Reason.PERMISSION_DENIED,
    }
)
"""Not mended by sending the same weights again."""


class WeightsRefused(Exception):
    """A replica will never take these weights: another model, or a version that it had already."""


LeaveOut = Callable[[str, Exception], bool]
"""Told of the target of a replica that refuses for good, and why: True to go on without it."""


class WeightPort(Protocol):
    """The weight service of one replica; `steersman.client.AsyncWeightClient` is one."""

    @property
    def target(self) -> str:
        """Where it is; names the replica."""
        ...

    async def state(self, *, include_manifest: bool = False, timeout: float | None = 30.0) -> WeightState:
        """What the replica serves."""
        ...

    async def begin(
        self,
        version: WeightVersion,
        manifest: Sequence[TensorSpec],
        *,
        base_version: WeightVersion | None = None,
        digest: bytes = b"",
        idle_timeout_seconds: float = 60.0,
    ) -> Push:
        """Opens a push of weights with this digest; deltas apply to `base_version`."""
        ...

    def push(
        self, push_id: str, chunks: AsyncIterator[WeightChunk], *, relay: Sequence[RelayHop] = ()
    ) -> Awaitable[PushReceipt]:
        """Sends chunks, to be passed on along `relay`; what became of those stands in the receipt."""
        ...

    async def stage(self, push_id: str, digest: bytes) -> WeightSnapshot:
        """Verifies what was sent."""
        ...

    async def activate(self, version: WeightVersion, *, kv_cache: KvCachePolicy = ...) -> Activation:
        """Switches."""
        ...

    async def abort(self, push_id: str) -> None:
        """Gives up a push."""
        ...

    async def close(self) -> None:
        """Ends the connection."""
        ...


Connect = Callable[[str], WeightPort]
"""Makes the port of a target ("host:port"). Does not wait: a replica that is away is told by its first call."""
