"""Drives one replica: looks at what it serves, chooses what it lacks, and leaves that staged; then activates it.

Invariants:

- At most one transaction of ours is under way at a replica, whoever asked for it.
- What a replica serves is ours only if its digest is, whatever it calls the version.
- Of two jobs that push to one replica the one that came later keeps it; the other is told, and does not push it back.
- A delta goes only to a replica that says that it serves the version which the delta starts from, with that version's
  digest; after any doubt about its base, all weights go. What is staged is proven by the digest of all weights either
  way.
- A push that fails is aborted: else half of it would hold the replica until its lease ends.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from steersman.client.types import KvCachePolicy, Push, WeightSnapshot
from steersman.trainer.weights.cargo import Cargo, Delta
from steersman.trainer.weights.delivery import Delivered, Recipient
from steersman.trainer.weights.encode import Tally
from steersman.trainer.weights.history import DeltaHistory
from steersman.trainer.weights.image import Image, Manifest
from steersman.trainer.weights.ports import FINAL_REFUSALS, WeightPort, WeightsRefused
from steersman.wire.errors import Reason, SteersmanError, unavailable
from steersman.wire.identity import WeightVersion
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
_ABORT_SECONDS: Final = 2.0

Send = Callable[[Cargo, Recipient], Awaitable[Delivered]]


@dataclass(kw_only=True)
class Progress:
    """What a publication did at one replica."""

    pushed_bytes: int = 0
    tally: Tally = field(default_factory=Tally)
    pause_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Staged:
    """Weights that wait at a replica, or serve there already.

    Attributes:
        digest: of all of them.
        is_active: they serve there.
        push_id: of the push that brought them; empty if that is not known any more.
    """

    digest: bytes
    is_active: bool = False
    push_id: str = ""


class Replica:
    """One replica.

    Args:
        port: how to reach it.
        send: carries chunks to it.
        history: what it may get instead of all weights.
        lease_seconds: how long the replica keeps a push of which nothing is heard, staged ones included.
    """

    def __init__(
        self, port: WeightPort, send: Send, history: DeltaHistory, *, kv_cache: KvCachePolicy, lease_seconds: float
    ) -> None:
        self.port = port
        self.progress = Progress()
        self.image: Image | None = None
        self._send = send
        self._history = history
        self._kv_cache = kv_cache
        self._lease_seconds = lease_seconds
        self._lock = asyncio.Lock()
        self._is_closed = False
        self._limit: asyncio.Timeout | None = None
        self._aborting: set[asyncio.Task[None]] = set()
        self._num_delta_refusals = 0
        self._has_served_us = False

    @property
    def target(self) -> str:
        """Which replica."""
        return self.port.target

    @asynccontextmanager
    async def transaction(self, image: Image) -> AsyncIterator[None]:
        """Holds the replica for what leads to `image`; others wait. `stop` ends it with a SteersmanError that another
        try may mend; a refusal for good is raised as WeightsRefused.
        """
        async with self._lock:
            if self._is_closed:
                raise unavailable(f"{self.target} is no replica any more")
            try:
                async with asyncio.timeout(None) as self._limit:
                    self.image = image
                    yield
            except TimeoutError:
                raise unavailable(
                    f"the push of {image.version} to {self.target} was given up for a newer one"
                ) from None
            except SteersmanError as error:
                if error.reason in FINAL_REFUSALS:
                    raise WeightsRefused(f"{self.target} refuses {image.version}: {error}") from error
                raise
            finally:
                self.image, self._limit = None, None

    def stop(self) -> None:
        """Ends the transaction under way, if there is one. Again changes nothing."""
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(asyncio.get_running_loop().time())

    async def close(self) -> None:
        """Ends the transaction under way, refuses others, and closes the port."""
        self._is_closed = True
        self.stop()
        async with self._lock:
            if self._aborting:
                await asyncio.wait(self._aborting)
            await self.port.close()

    async def stage(self, image: Image) -> Staged:
        """Leaves the weights of `image` staged, if they are not active already. Within a `transaction`."""
        state = await self.port.state(include_manifest=True)
        manifest = state.manifest
        try:
            image.check(manifest)
        except ValueError as error:
            raise WeightsRefused(f"{self.target} serves another model: {error}") from error
        self._require_not_taken(state.active.version, image.version)
        digest = await asyncio.to_thread(image.digest, manifest)
        if state.active.version == image.version:
            self._require_ours(state.active, digest)
            return Staged(digest=digest, is_active=True)
        if (staged := state.staged) and staged.version == image.version and staged.digest == digest:
            return Staged(digest=digest)
        if self._num_delta_refusals < _MAX_DELTA_REFUSALS:
            route = await self._history.route(manifest, state.active, image.version)
            if route and (there := await self._push_route(route, digest)) is not None:
                return there
        return await self._push_all(image, manifest, digest)

    async def activate(self, version: WeightVersion, digest: bytes) -> None:
        """Switches to what is staged."""
        activation = await self.port.activate(version, kv_cache=self._kv_cache)
        self.progress.pause_seconds = max(self.progress.pause_seconds, activation.pause_seconds)
        self._require_ours(activation.active, digest)

    async def abort(self, push_id: str) -> None:
        """Gives up a push. No error if the replica is away: it will do so itself when the lease ends."""
        # A task of its own, which goes on if the one that waits for it here is cancelled once more.
        task = asyncio.create_task(self._abort_quietly(push_id))
        self._aborting.add(task)
        task.add_done_callback(self._aborting.discard)
        await asyncio.wait([task])

    async def _push_all(self, image: Image, manifest: Manifest, digest: bytes) -> Staged:
        push = await self._begin(image.version, manifest, digest)
        if push.already_active:
            return Staged(digest=digest, is_active=True)
        return await self._fill(push, image.full(manifest, max_bytes=push.max_chunk_bytes), digest)

    async def _push_route(self, route: Sequence[Delta], digest: bytes) -> Staged | None:
        """Leaves what the last link makes staged, and the ones before were active for a moment. None if the replica
        will not have one of them: then it needs all weights.
        """
        try:
            for link in route[:-1]:
                there = await self._push_delta(link, link.digest)
                if there is None:
                    return None
                if not there.is_active:
                    await self.activate(link.version, link.digest)
            there = await self._push_delta(route[-1], digest)
        except SteersmanError as error:
            if error.reason not in _DELTA_REFUSALS:
                raise
            self._num_delta_refusals += 1
            _log.warning("%s refused a delta, it gets all weights: %s", self.target, error)
            return None
        self._num_delta_refusals = 0
        return there

    async def _push_delta(self, delta: Delta, digest: bytes) -> Staged | None:
        """None if its chunks are too large for the replica."""
        push = await self._begin(delta.version, delta.manifest, digest, base_version=delta.base_version)
        if push.already_active:
            return Staged(digest=digest, is_active=True)
        if push.max_chunk_bytes < delta.max_bytes:
            await self.abort(push.push_id)
            return None
        return await self._fill(push, delta, digest)

    async def _begin(
        self, version: WeightVersion, manifest: Manifest, digest: bytes, *, base_version: WeightVersion | None = None
    ) -> Push:
        push = await self.port.begin(
            version,
            manifest,
            base_version=base_version,
            digest=digest,
            idle_timeout_seconds=self._lease_seconds,
        )
        push = replace(push, max_chunk_bytes=min(push.max_chunk_bytes or WEIGHT_CHUNK_BYTES, WEIGHT_CHUNK_BYTES))
        if not push.already_active:
            self._history.note(manifest, push.max_chunk_bytes)
        return push

    async def _fill(self, push: Push, cargo: Cargo, digest: bytes) -> Staged:
        """Sends and has it verified."""

        async def reopen() -> str:
            nonlocal push
            push = await self._begin(cargo.version, cargo.manifest, digest, base_version=cargo.base_version)
            return push.push_id

        try:
            delivered = await self._send(cargo, Recipient(port=self.port, push_id=push.push_id, reopen=reopen))
            if delivered.error is not None:
                raise delivered.error
            self.progress.pushed_bytes += delivered.sent_bytes
            self.progress.tally.add(cargo.tally)
            await self.port.stage(push.push_id, digest)
        except BaseException:
            await self.abort(push.push_id)
            raise
        return Staged(digest=digest, push_id=push.push_id)

    async def _abort_quietly(self, push_id: str) -> None:
        try:
            await asyncio.wait_for(self.port.abort(push_id), _ABORT_SECONDS)
        except (SteersmanError, TimeoutError) as error:
            _log.info("push %s at %s was not aborted, it will time out there: %s", push_id, self.target, error)

    def _require_not_taken(self, active: WeightVersion, wanted: WeightVersion) -> None:
        """A replica may serve what another job made before us, and what our own job made; but not after us."""
        if self._has_served_us and active.run_id and active.job != wanted.job:
            raise WeightsRefused(
                f"{self.target} served this job and now serves {active}: another trainer has taken it over"
            )

    def _require_ours(self, active: WeightSnapshot, digest: bytes) -> None:
        if active.digest != digest:
            raise WeightsRefused(
                f"{self.target} serves other weights as {active.version} (digest {active.digest.hex()}, must be "
                f"{digest.hex()}): another trainer pushes under this run id"
            )
        self._has_served_us = True
