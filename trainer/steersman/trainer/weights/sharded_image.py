"""The lead's side of a sharded publication: an image of which this process holds a part, and what travels of it.

Every call goes to all ranks at once, this one included.
"""

import asyncio
import threading
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from steersman.client.types import PushReceipt, RelayHop, RelayReceipt, TensorSpec
from steersman.trainer.weights.cargo import EncodedDelta, FullCargo
from steersman.trainer.weights.crew import Crew, RankLost
from steersman.trainer.weights.encode import PushEncoding, Tally
from steersman.trainer.weights.image import Image, check_manifest, wire_manifest
from steersman.trainer.weights.letters import hops_to_json, manifest_to_json, sent_from_json
from steersman.trainer.weights.ports import WeightPort
from steersman.trainer.weights.shards import Layout
from steersman.trainer.weights.slices import Manifest, WeightSlices
from steersman.trainer.weights.stream import Sent
from steersman.wire.errors import Reason, SteersmanError, unavailable
from steersman.wire.identity import WeightVersion
from steersman.wire.weights.digest import DIGEST_BYTES, TILE_ELEMENTS, WeightDigest, num_tiles

# Hashing runs at gigabytes a second: a rank that takes longer is stuck.
_HASH_SECONDS: Final = 600.0


class ShardedImage:
    """An `Image` whose parts the ranks hold: `slices` is this one's, `layout` says what the others have. They know it
    by `number`, and forget it when this one is gone.
    """

    def __init__(self, crew: Crew, number: int, slices: WeightSlices, layout: Layout) -> None:
        self.crew = crew
        self.number = number
        self.slices = slices
        self._layout = layout
        self._held = {name: (names, shape) for names, shape in layout.tensors for name in names}
        self._index = {name: at for at, (names, _) in enumerate(layout.tensors) for name in names}
        self._digests: dict[Manifest, bytes] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, crew.tell, "forget_image", image=number).atexit = False

    @property
    def version(self) -> WeightVersion:
        """Which."""
        return self.slices.version

    def check(self, manifest: Sequence[TensorSpec]) -> None:
        """As in `Image`."""
        check_manifest(manifest, self._held)

    def digest(self, manifest: Sequence[TensorSpec]) -> bytes:
        """As in `Image`. Each rank hashes its own tiles, of which the digests come here. RankLost if one does not."""
        key = tuple(manifest)
        with self._lock:
            if key not in self._digests:
                asked = manifest_to_json(manifest)
                calls = [self.crew.call(rank, "hash", image=self.number, manifest=asked) for rank in self.crew.ranks]
                parts = [b"".join(self.slices.tile_digests(manifest))]
                try:
                    parts += [call.result(_HASH_SECONDS)[1] for call in calls]
                except TimeoutError:
                    raise RankLost(f"a rank has not hashed its weights within {_HASH_SECONDS:g} s") from None
                self._digests[key] = self._joined(manifest, parts)
            return self._digests[key]

    def full(self, manifest: Manifest, *, max_bytes: int) -> "ShardedFull":
        """As in `Image`."""
        return ShardedFull(image=self, manifest=manifest, max_bytes=max_bytes)

    def since(
        self,
        base: Image,
        manifest: Manifest,
        *,
        base_digest: bytes,
        max_bytes: int,
        encoding: PushEncoding,
        threads: Executor,
    ) -> "ShardedDelta":
        """As in `Image`."""
        assert isinstance(base, ShardedImage)
        return ShardedDelta(
            base,
            self,
            manifest,
            base_digest=base_digest,
            max_bytes=max_bytes,
            encoding=encoding,
            threads=threads,
        )

    def _joined(self, manifest: Sequence[TensorSpec], parts: Sequence[bytes]) -> bytes:
        digest = WeightDigest(wire_manifest(manifest))
        for rank, part in enumerate(parts):
            at = 0
            for index, spec in enumerate(manifest):
                start, end = self._layout.bounds[rank, self._index[spec.name]].tolist()
                behind = at + DIGEST_BYTES * num_tiles(end - start)
                digest.put(index, start // TILE_ELEMENTS, part[at:behind])
                at = behind
        return digest.finish()


@dataclass(frozen=True, kw_only=True)
class ShardedFull:
    """All weights of an image: a `Cargo`."""

    image: ShardedImage
    manifest: Manifest
    max_bytes: int
    base_version: None = None

    @property
    def version(self) -> WeightVersion:
        """Of the image."""
        return self.image.version

    @property
    def tally(self) -> Tally:
        """As in `Cargo`."""
        return Tally(elements=sum(int(np.prod(spec.shape, dtype=np.int64)) for spec in self.manifest))

    async def push(
        self, port: WeightPort, push_id: str, *, relay: Sequence[RelayHop] = (), patience_seconds: float | None = None
    ) -> Sent:
        """As in `Cargo`."""
        own = FullCargo(slices=self.image.slices, manifest=self.manifest, max_bytes=self.max_bytes)
        return await _push_everywhere(
            self.image.crew,
            own.push(port, push_id, relay=relay, patience_seconds=patience_seconds),
            "push_full",
            image=self.image.number,
            manifest=manifest_to_json(self.manifest),
            max_bytes=self.max_bytes,
            target=port.target,
            push_id=push_id,
            relay=hops_to_json(relay),
            patience_seconds=patience_seconds,
        )


class ShardedDelta:
    """What turns `base` into `image`, each rank's part encoded there: a `Delta`."""

    def __init__(
        self,
        base: ShardedImage,
        image: ShardedImage,
        manifest: Manifest,
        *,
        base_digest: bytes,
        max_bytes: int,
        encoding: PushEncoding,
        threads: Executor,
    ) -> None:
        self.manifest = manifest
        self._crew = crew = image.crew
        self._number = number = crew.next_number()
        self._other_bytes = 0
        self._other_tally = Tally()
        crew.tell(
            "encode",
            delta=number,
            base=base.number,
            image=image.number,
            manifest=manifest_to_json(manifest),
            max_bytes=max_bytes,
            encoding=str(encoding),
        )
        weakref.finalize(self, crew.tell, "forget_delta", delta=number).atexit = False
        self._own = EncodedDelta(
            base.slices,
            image.slices,
            manifest,
            base_digest=base_digest,
            hash_all=lambda: image.digest(manifest),
            max_bytes=max_bytes,
            encoding=encoding,
            threads=threads,
        )
        self._task = asyncio.create_task(self._finish())
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    @property
    def version(self) -> WeightVersion:
        """As in `Cargo`."""
        return self._own.version

    @property
    def base_version(self) -> WeightVersion:
        """As in `Delta`."""
        return self._own.base_version

    @property
    def base_digest(self) -> bytes:
        """As in `Delta`."""
        return self._own.base_digest

    @property
    def digest(self) -> bytes:
        """As in `Delta`."""
        is_complete = self._task.done() and not self._task.cancelled() and self._task.exception() is None
        return self._own.digest if is_complete else b""

    @property
    def max_bytes(self) -> int:
        """As in `Delta`."""
        return self._own.max_bytes

    @property
    def num_bytes(self) -> int:
        """As in `Delta`. Those of other ranks count when all is complete."""
        return self._own.num_bytes + self._other_bytes

    @property
    def tally(self) -> Tally:
        """As in `Cargo`."""
        total = Tally()
        total.add(self._own.tally)
        total.add(self._other_tally)
        return total

    async def push(
        self, port: WeightPort, push_id: str, *, relay: Sequence[RelayHop] = (), patience_seconds: float | None = None
    ) -> Sent:
        """As in `Cargo`."""
        sent = await _push_everywhere(
            self._crew,
            self._own.push(port, push_id, relay=relay, patience_seconds=patience_seconds),
            "push_delta",
            delta=self._number,
            target=port.target,
            push_id=push_id,
            relay=hops_to_json(relay),
            patience_seconds=patience_seconds,
        )
        await self.finish()  # for the tally
        return sent

    async def finish(self) -> None:
        """As in `Delta`."""
        await asyncio.wait([self._task])
        if self._task.cancelled():
            raise unavailable(f"the difference from {self.base_version} to {self.version} was given up")
        self._task.result()

    def cancel(self) -> None:
        """As in `Delta`."""
        self._own.cancel()
        self._task.cancel()
        self._crew.tell("forget_delta", delta=self._number)

    async def seal(self) -> None:
        """As in `Delta`."""
        await self._crew.call_all("seal", delta=self._number)
        await self._own.seal()

    async def _finish(self) -> None:
        others = await self._crew.call_all("finish", delta=self._number)
        await self._own.finish()
        for (num_bytes, elements, delta_elements), _ in others:
            self._other_bytes += num_bytes
            self._other_tally.add(Tally(elements=elements, delta_elements=delta_elements))


async def _push_everywhere(crew: Crew, own: Coroutine[Any, Any, Sent], name: str, **arguments: Any) -> Sent:
    """Has every rank send its part; what all of them sent together.

    Where one fails the others are stopped, and the replica has dropped the push with the stream that broke, which is
    then what they say: so the first error that says something else is raised.
    """
    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(own)]
    tasks += [asyncio.wrap_future(crew.call(rank, name, **arguments)) for rank in crew.ranks]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        await asyncio.wait(tasks, timeout=_AFTERMATH_SECONDS)
        errors = [task.exception() for task in tasks if task.done() and not task.cancelled()]
        for error in sorted((one for one in errors if one is not None), key=_is_consequence):
            raise error
        own_sent, *others = [task.result() for task in tasks]
        return _together([own_sent, *(sent_from_json(result) for result, _ in others)])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


# What a stream that broke leaves the others to say comes within a moment, if it comes.
_AFTERMATH_SECONDS: Final = 1.0


def _is_consequence(error: BaseException) -> bool:
    return isinstance(error, SteersmanError) and error.reason in (Reason.WEIGHT_PUSH_NOT_ACTIVE, None)


def _together(parts: Sequence[Sent]) -> Sent:
    """The sums; a replica of the relay has all only if it has what every rank sent."""
    relayed: dict[str, RelayReceipt] = {}
    for part in parts:
        for one in part.receipt.relayed:
            before = relayed.get(one.target, RelayReceipt(target=one.target))
            relayed[one.target] = RelayReceipt(
                target=one.target,
                error=before.error or one.error,
                received_bytes=before.received_bytes + one.received_bytes,
                num_chunks=before.num_chunks + one.num_chunks,
            )
    receipt = PushReceipt(
        received_bytes=sum(part.receipt.received_bytes for part in parts),
        num_chunks=sum(part.receipt.num_chunks for part in parts),
        relayed=tuple(relayed.values()),
    )
    return Sent(receipt=receipt, num_bytes=sum(part.num_bytes for part in parts))
