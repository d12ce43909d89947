"""The weights of one replica, and the transaction that replaces them.

    begin -> write... -> stage -> activate -> (rollback)

Invariants:

- until `activate` succeeds the old weights serve, and what failed leaves their host copy and digest as they were;
- one push at a time; only the job that opened it may open another in its place, by the same attempt or a later one, or
  anyone once it has been idle for longer than it said;
- a version never gives way to an older one of its job (`WeightVersion.is_stale_against`);
- the engine is asked to load only weights whose manifest and digest were checked here;
- `stage`, `activate` and `rollback` run to their end even if the caller goes away.

There are two host copies. They change places at activation, so the copy of the version before stays until the next push
begins, and so does the chance to roll back.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

import numpy as np

from steersman.policy.engine.port import EngineDeadError, GenerationEngine, KvCachePolicy, WeightLoadError
from steersman.policy.weights.manifest import HostManifest, digest
from steersman.policy.weights.memory import HostCopy
from steersman.policy.weights.push import Phase, Push
from steersman.policy.weights.records import BeginRequest, Snapshot, Switch, check_digest
from steersman.wire.errors import Reason, SteersmanError, invalid_field, unavailable
from steersman.wire.identity import WeightVersion
from steersman.wire.weights.messages import Chunk

_LOG = logging.getLogger(__name__)

T = TypeVar("T")


class WeightSource(Protocol):
    """Where the weights of start-up come from (`checkpoint.Checkpoint`)."""

    manifest: HostManifest

    def read_into(self, copy: memoryview) -> None:
        """Fills a host copy."""
        ...


class WeightStore:
    """Host copies and the state of the transaction; see the module. All methods run on one event loop."""

    def __init__(self, engine: GenerationEngine, source: WeightSource, kv_cache: KvCachePolicy) -> None:
        """Reads the weights of start-up. Raises `ValueError` or `MemoryError` if that fails."""
        self.manifest = source.manifest
        self._engine = engine
        self._kv_cache = kv_cache
        self._serving = HostCopy(self.manifest)
        self._staging = HostCopy(self.manifest)
        source.read_into(self._serving.bytes)
        self.initial_digest = digest(self.manifest, self._serving.bytes)
        self.active = Snapshot(version=WeightVersion(), digest=self.initial_digest, activated_at=time.time())
        self.previous: Snapshot | None = None
        self._push: Push | None = None
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def staged(self) -> Snapshot | None:
        """Weights that are verified and wait."""
        push = self._current()
        if push is None or push.phase is not Phase.STAGED:
            return None
        return Snapshot(version=push.version, digest=push.digest)

    @property
    def pushing(self) -> WeightVersion | None:
        """Version of the push under way."""
        push = self._current()
        return push.version if push else None

    async def begin(self, request: BeginRequest) -> str | None:
        """Opens a push and returns its id; None if the version is active already.

        Raises WEIGHT_VERSION_STALE, WEIGHT_BASE_MISMATCH, WEIGHT_MANIFEST_MISMATCH, WEIGHT_PUSH_IN_PROGRESS, or
        INVALID_FIELD.
        """
        async with self._lock:
            version = request.version
            request.check()
            if version == self.active.version:
                self._require_same_digest(request)
                return None
            if version.is_stale_against(self.active.version):
                raise SteersmanError(
                    Reason.WEIGHT_VERSION_STALE,
                    f"version {version} is older than {self.active.version}, which is active",
                )
            self._check_base(request)
            self.manifest.require_same(request.tensors)
            self._require_free(version)
            await self._drop()
            self.previous = None
            if request.partial:
                await asyncio.to_thread(_copy, self._serving.bytes, self._staging.bytes)
            self._push = Push(
                push_id=uuid.uuid4().hex,
                version=version,
                partial=request.partial,
                idle_timeout_s=request.idle_timeout_s,
                manifest=self.manifest,
                staging=self._staging.bytes,
                base=self._serving.bytes if request.base_version is not None else None,
            )
            _LOG.info("push begun", extra={"version": str(version), "push_id": self._push.push_id})
            return self._push.push_id

    def require_push(self, push_id: str) -> None:
        """Raises WEIGHT_PUSH_NOT_ACTIVE unless that push is under way."""
        self._require(push_id)

    async def write(self, push_id: str, chunk: Chunk) -> None:
        """Puts a chunk into the staging copy. Raises WEIGHT_PUSH_NOT_ACTIVE or WEIGHT_CHUNK_INVALID."""
        await self._require(push_id).write(chunk)

    async def stage(self, push_id: str, expected: bytes) -> Snapshot:
        """Verifies the complete weights and prepares them in the engine. Staging twice changes nothing.

        Raises WEIGHTS_INCOMPLETE (the push stays open), WEIGHT_DIGEST_MISMATCH or WEIGHT_ACTIVATION_FAILED (it is
        gone).
        """
        check_digest(expected)
        return await self._to_the_end(self._stage(push_id, expected))

    async def activate(self, version: WeightVersion, kv_cache: KvCachePolicy | None = None) -> Switch:
        """Switches to the staged `version`; does nothing if it is active.

        Raises WEIGHT_PUSH_NOT_ACTIVE if it is not staged, WEIGHT_ACTIVATION_FAILED if the engine refuses.
        """
        return await self._to_the_end(self._activate(version, kv_cache or self._kv_cache))

    async def rollback(self, version: WeightVersion, kv_cache: KvCachePolicy | None = None) -> Switch:
        """Switches back to `version`, which must be the previous one; does nothing if it is active.

        Raises WEIGHT_VERSION_STALE if there is no way back to it, WEIGHT_ACTIVATION_FAILED if the engine refuses.
        """
        return await self._to_the_end(self._rollback(version, kv_cache or self._kv_cache))

    async def abort(self, push_id: str) -> None:
        """Gives up a push. Raises WEIGHT_PUSH_NOT_ACTIVE if it is not the one under way."""
        async with self._lock:
            self._require(push_id)
            await self._drop()

    def sender_gone(self, push_id: str) -> None:
        """Gives up a push whose stream broke: what was still to come will not, and the replica is free at once."""

        async def give_up() -> None:
            async with self._lock:
                push = self._current()
                if push is not None and push.push_id == push_id and push.phase is Phase.RECEIVING:
                    await self._drop()

        task = asyncio.create_task(give_up())
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    async def close(self) -> None:
        """Waits for what is under way and gives the host memory back."""
        if self._tasks:
            await asyncio.wait(self._tasks)
        push, self._push = self._push, None
        if push is not None:
            await push.settle()
        self._serving.close()
        self._staging.close()

    async def _stage(self, push_id: str, expected: bytes) -> Snapshot:
        async with self._lock:
            push = self._require(push_id)
            if push.phase is not Phase.STAGED:
                await push.settle()
                push.require_complete()
                push.phase = Phase.VERIFYING
                try:
                    found = await push.compute_digest()
                    if found != expected:
                        raise _digest_mismatch(push.version, found, expected)
                    with _engine_errors():
                        await self._engine.stage(self._staging.weights)
                except BaseException:
                    await self._drop()
                    raise
                push.digest = found
                push.phase = Phase.STAGED
                push.touch()
            elif push.digest != expected:
                raise _digest_mismatch(push.version, push.digest, expected)
            return Snapshot(version=push.version, digest=push.digest)

    async def _activate(self, version: WeightVersion, kv_cache: KvCachePolicy) -> Switch:
        async with self._lock:
            if version == self.active.version:
                return Switch(active=self.active)
            push = self._current()
            if push is None or push.phase is not Phase.STAGED or push.version != version:
                staged = push.version if push and push.phase is Phase.STAGED else "nothing"
                raise SteersmanError(
                    Reason.WEIGHT_PUSH_NOT_ACTIVE, f"version {version} is not staged; staged is {staged}"
                )
            try:
                with _engine_errors():
                    done = await self._engine.activate(version, self._staging.weights, kv_cache)
            except BaseException:
                await self._drop()
                raise
            self._push = None
            self._exchange(Snapshot(version=version, digest=push.digest, activated_at=time.time()))
            return Switch(
                active=self.active,
                pause_s=done.pause_s,
                num_running_requests=done.num_running_requests,
                push_s=time.monotonic() - push.began,
            )

    async def _rollback(self, version: WeightVersion, kv_cache: KvCachePolicy) -> Switch:
        async with self._lock:
            if version == self.active.version:
                return Switch(active=self.active)
            if self.previous is None or version != self.previous.version:
                previous = self.previous.version if self.previous else "nothing"
                raise SteersmanError(
                    Reason.WEIGHT_VERSION_STALE,
                    f"cannot return to version {version}; previous is {previous} (a new push ends the way back)",
                )
            with _engine_errors():
                done = await self._engine.rollback(version, self._staging.weights, kv_cache)
            self._exchange(Snapshot(version=version, digest=self.previous.digest, activated_at=time.time()))
            return Switch(active=self.active, pause_s=done.pause_s, num_running_requests=done.num_running_requests)

    def _exchange(self, active: Snapshot) -> None:
        self._serving, self._staging = self._staging, self._serving
        self.previous, self.active = self.active, active
        _LOG.info("weights active", extra={"version": str(active.version), "digest": active.digest.hex()})

    def _require_same_digest(self, request: BeginRequest) -> None:
        if request.digest and request.digest != self.active.digest:
            raise SteersmanError(
                Reason.WEIGHT_VERSION_STALE,
                f"version {request.version} is active with digest {self.active.digest.hex()}, not "
                f"{request.digest.hex()}: other weights have taken this version; push yours as a later step or run",
            )

    def _check_base(self, request: BeginRequest) -> None:
        base = request.base_version
        if request.partial and base is None:
            raise invalid_field("base_version", None, "the active version, for a partial push")
        if base is not None and base != self.active.version:
            raise SteersmanError(
                Reason.WEIGHT_BASE_MISMATCH,
                f"base_version is {base}, active is {self.active.version}; push all weights instead",
            )

    def _require_free(self, version: WeightVersion) -> None:
        push = self._current()
        if push is None:
            return
        if push.version.job == version.job:
            if version.attempt < push.version.attempt:
                raise SteersmanError(
                    Reason.WEIGHT_VERSION_STALE,
                    f"version {version} is of an older attempt than {push.version}, on its way",
                )
        else:
            left = max(0.0, push.idle_timeout_s - push.idle_s)
            raise SteersmanError(
                Reason.WEIGHT_PUSH_IN_PROGRESS,
                f"run {push.version.run_id!r} is pushing {push.version}; "
                f"it keeps the replica for {left:.0f} s after its last chunk",
                retry_after_seconds=left,
            )

    def _current(self) -> Push | None:
        """The push under way, None if there is none or if its lease has ended."""
        push = self._push
        if push is None or (push.phase is not Phase.VERIFYING and push.idle_s > push.idle_timeout_s):
            return None
        return push

    def _require(self, push_id: str) -> Push:
        push = self._current()
        if push is None or push.push_id != push_id:
            raise SteersmanError(
                Reason.WEIGHT_PUSH_NOT_ACTIVE, f"push {push_id!r} is unknown, finished, aborted or expired"
            )
        return push

    async def _drop(self) -> None:
        """Forgets the push. The engine may be beyond help; the store is in order all the same."""
        push, self._push = self._push, None
        if push is not None:
            _LOG.info("push dropped", extra={"version": str(push.version), "push_id": push.push_id})
            await push.settle()
            try:
                await self._engine.discard_staged()
            except (WeightLoadError, EngineDeadError):
                _LOG.warning("engine could not discard staged weights", exc_info=True)

    async def _to_the_end(self, operation: Coroutine[Any, Any, T]) -> T:
        """Runs `operation` in a task that a cancelled caller does not cancel."""
        task = asyncio.create_task(operation)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # has been told to the caller, if there still is one


class _engine_errors:  # noqa: N801 (reads as a statement)
    """Turns the errors of the engine port into public ones."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, WeightLoadError):
            message = "the engine did not take the weights; the version before serves on"
            raise SteersmanError(Reason.WEIGHT_ACTIVATION_FAILED, message) from error
        if isinstance(error, EngineDeadError):
            raise unavailable("the engine died") from error


def _digest_mismatch(version: WeightVersion, found: bytes, expected: bytes) -> SteersmanError:
    return SteersmanError(
        Reason.WEIGHT_DIGEST_MISMATCH,
        f"weights of version {version} have digest {found.hex()}, announced was {expected.hex()}",
    )


def _copy(source: memoryview, target: memoryview) -> None:
    # numpy gives the interpreter to others meanwhile; a slice assignment would hold up the event loop.
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
