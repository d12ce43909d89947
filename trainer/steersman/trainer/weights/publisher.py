"""Drives every policy replica to the wanted weights.

Invariants:

- The wanted version only moves forward, and a version names one set of weights for ever. A trainer that
  resumes from step k makes step k + 1 again, with other weights: so the run id that travels holds the number
  of the attempt ("demo.2"), which is counted up on disk before the first push (see `next_attempt`).
- At most one push of ours is under way at a replica.
- A replica that fails does not hold up the others: it stays behind, and `ensure_current` repairs it before it
  gets prompts.
- What a replica serves is ours only if its digest is, whatever it calls the version.
- A delta goes only to a replica that says that it serves the version before, with that version's digest; after any
  doubt about its base, all weights go. What is staged is proven by the digest of all weights either way.
- The event loop never waits for conversion, encoding or hashing: threads do that.
"""

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final, Protocol

from steersman.client.types import (
    Activation,
    KvCachePolicy,
    Push,
    PushReceipt,
    WeightChunk,
    WeightSnapshot,
    WeightState,
)
from steersman.client.types import TensorSpec as TensorSpec
from steersman.trainer.retry import Backoff, Sleep, Waits
from steersman.trainer.weights.encode import MIN_DELTA_CHUNK_BYTES, PushEncoding, Tally, difference
from steersman.trainer.weights.image import Manifest, WeightImage
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.identity import WeightVersion
from steersman.wire.limits import WEIGHT_CHUNK_BYTES

_log = logging.getLogger(__name__)

ATTEMPT_FILE: Final = "attempt.json"
# Converted ahead of the stream: enough to keep it busy while a thread makes the next, small beside any model.
_CHUNKS_AHEAD: Final = 4
# Encoders release the interpreter; more would take cores from the trainer for a link that is busy already.
_ENCODER_THREADS: Final = 2
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
# Not mended by sending the same weights again.
_REFUSALS: Final = frozenset(
    {
        Reason.WEIGHT_VERSION_STALE,
        Reason.WEIGHT_MANIFEST_MISMATCH,
        Reason.INVALID_FIELD,
        Reason.UNIMPLEMENTED,
        Reason.UNAUTHENTICATED,
        Reason.PERMISSION_DENIED,
    }
)


class WeightPort(Protocol):
    """The weight service of one replica; `steersman.client.AsyncWeightClient` is one."""

    target: str

    async def state(self, *, include_manifest: bool = False, timeout: float | None = 30.0) -> WeightState:
        """What the replica serves."""
        ...

    async def begin(
        self,
        version: WeightVersion,
        manifest: Sequence[TensorSpec],
        *,
        base_version: WeightVersion | None = None,
        idle_timeout_seconds: float = 60.0,
    ) -> Push:
        """Opens a push; deltas apply to `base_version`."""
        ...

    def push(self, push_id: str, chunks: AsyncIterator[WeightChunk]) -> Awaitable[PushReceipt]:
        """Sends chunks."""
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


class WeightsRefused(Exception):
    """A replica will never take these weights: another model, or a version that it had already."""


@dataclass(frozen=True, kw_only=True)
class PublishReport:
    """What a publication did.

    Attributes:
        seconds: until the last replica was done or had failed.
        pushed_bytes: over all replicas.
        delta_share: of the elements, over all replicas, that travelled as a sparse delta.
        pause_seconds: the longest time that generation stood still at one replica.
        failures: why, by address, for replicas that stayed behind.
    """

    seconds: float
    pushed_bytes: int = 0
    delta_share: float = 0.0
    pause_seconds: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class _Replica:
    port: WeightPort
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    pushed_bytes: int = 0
    tally: Tally = field(default_factory=Tally)
    pause_seconds: float = 0.0
    num_delta_refusals: int = 0


class Publisher:
    """Publishes weights under `run_id` to a fixed list of replicas. Lives on one event loop.

    Args:
        ports: the weight services, in the order in which the rollouts number the replicas.
        run_id: of this attempt; unique for every start of a trainer.
        push_attempts: tries of one push within `publish`.
        encoding: how weights travel to replicas that serve the version before; but for DENSE that is kept, one more
            copy of the weights on the host.
    """

    def __init__(
        self,
        ports: Sequence[WeightPort],
        *,
        run_id: str,
        push_attempts: int = 3,
        backoff: Backoff | None = None,
        waits: Waits | None = None,
        kv_cache: KvCachePolicy = KvCachePolicy.SERVER_DEFAULT,
        encoding: PushEncoding = PushEncoding.AUTO,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.run_id = run_id
        self._replicas = [_Replica(port=port) for port in ports]
        self._push_attempts = push_attempts
        self._backoff = backoff or Backoff()
        self._waits = waits or Waits()
        self._kv_cache = kv_cache
        self._sleep = sleep
        self._encoding = encoding
        self._threads = ThreadPoolExecutor(_ENCODER_THREADS, thread_name_prefix="steersman-encoder")
        self._image: WeightImage | None = None
        self._base: WeightImage | None = None

    def close(self) -> None:
        """Ends the encoder's threads. Pushes under way fail."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def wanted(self) -> WeightVersion | None:
        """The version that every replica should serve; None before the first publication."""
        return self._image.version if self._image is not None else None

    def accepts(self, run_id: str, step: int, *, oldest_step: int) -> bool:
        """True if these weights are of this attempt, were published, and are of `oldest_step` or later."""
        wanted = self.wanted
        return wanted is not None and run_id == wanted.run_id and oldest_step <= step <= wanted.step

    async def publish(self, image: WeightImage) -> PublishReport:
        """Makes `image` the wanted weights and pushes it to all replicas at once.

        A replica that cannot be reached or breaks off is in the report; WeightsRefused if one refuses for
        good. ValueError if the version is not of this attempt or not newer than the wanted one.
        """
        if image.version.run_id != self.run_id or (self.wanted is not None and image.version <= self.wanted):
            raise ValueError(f"version is {image.version}, must be of run {self.run_id} and after {self.wanted}")
        started = time.monotonic()
        self._base = self._image if self._encoding is not PushEncoding.DENSE else None
        self._image = image
        for replica in self._replicas:
            replica.pushed_bytes, replica.pause_seconds, replica.tally = 0, 0.0, Tally()
        results = await asyncio.gather(
            *(self._push_patiently(number) for number in range(len(self._replicas))), return_exceptions=True
        )
        failures: dict[str, str] = {}
        for replica, result in zip(self._replicas, results, strict=True):
            if isinstance(result, SteersmanError):
                failures[replica.port.target] = str(result)
                _log.warning("weights %s did not reach %s yet: %s", image.version, replica.port.target, result)
            elif isinstance(result, BaseException):
                raise result
        total = Tally()
        for replica in self._replicas:
            total.add(replica.tally)
        return PublishReport(
            seconds=time.monotonic() - started,
            delta_share=total.delta_share,
            pushed_bytes=sum(replica.pushed_bytes for replica in self._replicas),
            pause_seconds=max((replica.pause_seconds for replica in self._replicas), default=0.0),
            failures=failures,
        )

    async def ensure_current(self, number: int) -> None:
        """Returns once replica `number` serves the wanted weights, pushing them if it does not.

        Raises the SteersmanError of a try that failed, WeightsRefused if there is no use in another.
        """
        replica = self._replicas[number]
        async with replica.lock:
            image = self._image
            if image is None:
                raise RuntimeError("nothing was published yet: publish the first weights before asking for rollouts")
            try:
                await self._drive(replica, image)
            except SteersmanError as error:
                if error.reason in _REFUSALS:
                    raise WeightsRefused(f"{replica.port.target} refuses {image.version}: {error}") from error
                raise

    async def reconcile(self) -> PublishReport:
        """Brings every replica to the wanted weights once more; the report names those that stayed behind."""
        started = time.monotonic()
        results = await asyncio.gather(
            *(self.ensure_current(number) for number in range(len(self._replicas))), return_exceptions=True
        )
        failures: dict[str, str] = {}
        for replica, result in zip(self._replicas, results, strict=True):
            if isinstance(result, SteersmanError):
                failures[replica.port.target] = str(result)
            elif isinstance(result, BaseException):
                raise result
        return PublishReport(seconds=time.monotonic() - started, failures=failures)

    async def _push_patiently(self, number: int) -> None:
        for attempt in range(self._push_attempts):
            try:
                return await self.ensure_current(number)
            except SteersmanError as error:
                if attempt + 1 == self._push_attempts:
                    raise
                what = f"weights to {self._replicas[number].port.target}"
                with self._waits.waiting(what):
                    await self._sleep(max(self._backoff.delay(attempt), error.retry_after_seconds or 0.0))
        return None

    async def _drive(self, replica: _Replica, image: WeightImage) -> None:
        """One look at the replica, and one push if it needs one."""
        port = replica.port
        state = await port.state(include_manifest=True)
        try:
            image.check(state.manifest)
        except ValueError as error:
            raise WeightsRefused(f"{port.target} serves another model: {error}") from error
        digest = await asyncio.to_thread(image.digest, state.manifest)
        if state.active.version == image.version:
            _require_ours(port.target, state.active, digest)
            return
        staged = state.staged
        if staged is None or staged.version != image.version or staged.digest != digest:
            base = await self._base_of(replica, state)
            if base is None or not await self._push_difference(replica, image, base, state.manifest, digest):
                await self._push(replica, image, None, state.manifest, digest)
        activation = await port.activate(image.version, kv_cache=self._kv_cache)
        replica.pause_seconds = max(replica.pause_seconds, activation.pause_seconds)
        _require_ours(port.target, activation.active, digest)

    async def _base_of(self, replica: _Replica, state: WeightState) -> WeightImage | None:
        """The version before, if that is what the replica serves, to the bit."""
        base = self._base
        if base is None or replica.num_delta_refusals >= _MAX_DELTA_REFUSALS or state.active.version != base.version:
            return None
        same = state.active.digest == await asyncio.to_thread(base.digest, state.manifest)
        return base if same else None

    async def _push_difference(
        self, replica: _Replica, image: WeightImage, base: WeightImage, manifest: Manifest, digest: bytes
    ) -> bool:
        """False if the replica will not have the difference: then it needs all weights."""
        try:
            await self._push(replica, image, base, manifest, digest)
        except SteersmanError as error:
            if error.reason not in _DELTA_REFUSALS:
                raise
            replica.num_delta_refusals += 1
            _log.warning("%s refused a delta, it gets all weights: %s", replica.port.target, error)
            return False
        replica.num_delta_refusals = 0
        return True

    async def _push(
        self, replica: _Replica, image: WeightImage, base: WeightImage | None, manifest: Manifest, digest: bytes
    ) -> None:
        """Leaves the weights staged, or active if they were already."""
        port = replica.port
        push = await port.begin(
            image.version,
            manifest,
            base_version=base.version if base is not None else None,
            idle_timeout_seconds=_LEASE_SECONDS,
        )
        if push.already_active:
            return
        max_bytes = min(push.max_chunk_bytes or WEIGHT_CHUNK_BYTES, WEIGHT_CHUNK_BYTES)
        if base is None or max_bytes < MIN_DELTA_CHUNK_BYTES:
            chunks = image.chunks(manifest, max_bytes=max_bytes)
        else:
            chunks = difference(
                base, image, manifest, encoding=self._encoding, max_bytes=max_bytes, threads=self._threads
            )
        tally = Tally()
        try:
            receipt = await port.push(push.push_id, _made_ahead(tally.count(chunks)))
            replica.pushed_bytes += receipt.received_bytes
            replica.tally.add(tally)
            await port.stage(push.push_id, digest)
        except BaseException:
            # Else the half push would hold the replica until its idle timeout, if it still knows of it.
            await _abort_quietly(port, push.push_id)
            raise


def _require_ours(target: str, active: WeightSnapshot, digest: bytes) -> None:
    if active.digest != digest:
        raise WeightsRefused(
            f"{target} serves other weights as {active.version} (digest {active.digest.hex()}, must be "
            f"{digest.hex()}): another trainer pushes under this run id"
        )


async def _made_ahead(chunks: Iterator[WeightChunk]) -> AsyncIterator[WeightChunk]:
    """The chunks, each few made by a thread while the few before are sent."""

    def some() -> list[WeightChunk]:
        return list(islice(chunks, _CHUNKS_AHEAD))

    coming = asyncio.create_task(asyncio.to_thread(some))
    try:
        while ready := await coming:
            coming = asyncio.create_task(asyncio.to_thread(some))
            for chunk in ready:
                yield chunk
    finally:
        coming.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody wants it any more


async def _abort_quietly(port: WeightPort, push_id: str) -> None:
    try:
        await asyncio.wait_for(asyncio.shield(port.abort(push_id)), 5.0)
    except (SteersmanError, TimeoutError) as error:
        _log.info("push %s at %s was not aborted, it will time out there: %s", push_id, port.target, error)


def next_attempt(directory: Path) -> int:
    """The number of this start of the run in `directory`, 1 for the first; on disk before it returns.

    Counted even if the start fails at once: a number is never used twice, whatever is killed when.
    """
    path = directory / ATTEMPT_FILE
    attempt = int(json.loads(path.read_text(encoding="utf-8"))["attempt"]) + 1 if path.exists() else 1
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"attempt": attempt}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return attempt
