"""Drives one replica: looks at what it serves, chooses what it lacks, and leaves that staged; then activates it.

Invariants:

- What a replica serves is ours only if its digest is, whatever it calls the version.
- A delta goes only to a replica that says that it serves the version before, with that version's digest; after any
  doubt about its base, all weights go. What is staged is proven by the digest of all weights either way.
- A push that fails is aborted: else half of it would hold the replica until its lease ends.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Final

from steersman.client.types import KvCachePolicy, WeightSnapshot, WeightState
from steersman.trainer.weights.cargo import DeltaCargo, FullCargo
from steersman.trainer.weights.delivery import Cargo, Delivered, Recipient
from steersman.trainer.weights.encode import MIN_DELTA_CHUNK_BYTES, PushEncoding, Tally
from steersman.trainer.weights.image import Manifest, WeightImage
from steersman.trainer.weights.ports import WeightPort, WeightsRefused
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.limits import WEIGHT_CHUNK_BYTES

_log = logging.getLogger(__name__)

# Says that the delta is at fault, not the weights: all of them may still be taken.
_DELTA_REFUSALS: Final = frozenset(
    {
        Reason.WEIGHT_BASE_MISMATCH,
        Reason.WEIGHT_CHUNK_INVALID,
        Reason.WEIGHT_DIGEST_MISMATCH,
        Reason.WEIGHTS_INCOMPLETE,
        Reason.UNIMPLEMENTED,
    }
)
# In a row, after which a replica gets no more: an older server does not know deltas.
_MAX_DELTA_REFUSALS: Final = 3
# A trainer that is killed between two calls holds a replica for so long; between chunks pass milliseconds.
_LEASE_SECONDS: Final = 20.0
_ABORT_SECONDS: Final = 5.0

Send = Callable[[Cargo, Recipient], Awaitable[Delivered]]


@dataclass(kw_only=True)
class Progress:
    """What a publication did at one replica."""

    pushed_bytes: int = 0
    tally: Tally = field(default_factory=Tally)
    pause_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a replica is driven to, from what it may be driven there by a delta, and how."""

    image: WeightImage
    base: WeightImage | None
    encoding: PushEncoding
    threads: Executor


class Replica:
    """One replica. `lock` is held by whoever drives it: at most one push of ours is under way there."""

    def __init__(self, port: WeightPort, send: Send, *, kv_cache: KvCachePolicy) -> None:
        self.port = port
        self.lock = asyncio.Lock()
        self.progress = Progress()
        self._send = send
        self._kv_cache = kv_cache
        self._num_delta_refusals = 0

    @property
    def target(self) -> str:
        """Which replica."""
        return self.port.target

    async def stage(self, wanted: Wanted) -> bytes | None:
        """Leaves the wanted weights staged and returns their digest; None if they are active already."""
        state = await self.port.state(include_manifest=True)
        image, manifest = wanted.image, state.manifest
        try:
            image.check(manifest)
        except ValueError as error:
            raise WeightsRefused(f"{self.target} serves another model: {error}") from error
        digest = await asyncio.to_thread(image.digest, manifest)
        if state.active.version == image.version:
            self._require_ours(state.active, digest)
            return None
        staged = state.staged
        if staged is None or staged.version != image.version or staged.digest != digest:
            base = await self._base(wanted, state)
            if base is None or not await self._push_difference(wanted, base, manifest, digest):
                await self._push(wanted, None, manifest, digest)
        return digest

    async def activate(self, image: WeightImage, digest: bytes) -> None:
        """Switches to the staged weights of `image`."""
        activation = await self.port.activate(image.version, kv_cache=self._kv_cache)
        self.progress.pause_seconds = max(self.progress.pause_seconds, activation.pause_seconds)
        self._require_ours(activation.active, digest)

    async def _base(self, wanted: Wanted, state: WeightState) -> WeightImage | None:
        """The version before, if that is what the replica serves, to the bit."""
        base = wanted.base
        if base is None or self._num_delta_refusals >= _MAX_DELTA_REFUSALS or state.active.version != base.version:
            return None
        same = state.active.digest == await asyncio.to_thread(base.digest, state.manifest)
        return base if same else None

    async def _push_difference(self, wanted: Wanted, base: WeightImage, manifest: Manifest, digest: bytes) -> bool:
        """False if the replica will not have the difference: then it needs all weights."""
        try:
            await self._push(wanted, base, manifest, digest)
        except SteersmanError as error:
            if error.reason not in _DELTA_REFUSALS:
                raise
            self._num_delta_refusals += 1
            _log.warning("%s refused a delta, it gets all weights: %s", self.target, error)
            return False
        self._num_delta_refusals = 0
        return True

    async def _push(self, wanted: Wanted, base: WeightImage | None, manifest: Manifest, digest: bytes) -> None:
        """Leaves the weights staged, or active if they were already."""
        push = await self.port.begin(
            wanted.image.version,
            manifest,
            base_version=base.version if base is not None else None,
            idle_timeout_seconds=_LEASE_SECONDS,
        )
        if push.already_active:
            return
        max_bytes = min(push.max_chunk_bytes or WEIGHT_CHUNK_BYTES, WEIGHT_CHUNK_BYTES)
        cargo: Cargo = FullCargo(image=wanted.image, manifest=manifest, max_bytes=max_bytes)
        if base is not None and max_bytes >= MIN_DELTA_CHUNK_BYTES:
            cargo = DeltaCargo(
                image=wanted.image,
                base=base,
                manifest=manifest,
                max_bytes=max_bytes,
                encoding=wanted.encoding,
                threads=wanted.threads,
            )
        try:
            delivered = await self._send(cargo, Recipient(port=self.port, push_id=push.push_id))
            if delivered.error is not None:
                raise delivered.error
            self.progress.pushed_bytes += delivered.sent_bytes
            self.progress.tally.add(cargo.tally)
            await self.port.stage(push.push_id, digest)
        except BaseException:
            await self._abort_quietly(push.push_id)
            raise

    async def _abort_quietly(self, push_id: str) -> None:
        try:
            await asyncio.wait_for(asyncio.shield(self.port.abort(push_id)), _ABORT_SECONDS)
        except (SteersmanError, TimeoutError) as error:
            _log.info("push %s at %s was not aborted, it will time out there: %s", push_id, self.target, error)

    def _require_ours(self, active: WeightSnapshot, digest: bytes) -> None:
        if active.digest != digest:
            raise WeightsRefused(
                f"{self.target} serves other weights as {active.version} (digest {active.digest.hex()}, must be "
                f"{digest.hex()}): another trainer pushes under this run id"
            )
