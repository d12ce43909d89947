"""What travels: all weights of an image, or the difference between two, encoded once for all who need it."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final, Protocol, TypeVar

from steersman.client.types import RelayHop, WeightChunk
from steersman.trainer.weights.encode import PushEncoding, Tally, difference
from steersman.trainer.weights.ports import WeightPort
from steersman.trainer.weights.slices import DensePart, Manifest, WeightSlices
from steersman.trainer.weights.stream import Sent, stream
from steersman.wire.errors import unavailable
from steersman.wire.identity import WeightVersion
from steersman.wire.tensors import dtype_from_name, item_bytes

# Converted ahead of the stream: enough to keep it busy while a thread makes the next, small beside any model.
_CHUNKS_AHEAD: Final = 4

T = TypeVar("T")


class Cargo(Protocol):
    """The content of a push: the same for all replicas that hold the same base in the same types. Hashable."""

    @property
    def version(self) -> WeightVersion:
        """What it makes."""
        ...

    @property
    def base_version(self) -> WeightVersion | None:
        """What its deltas apply to; None if it holds all weights."""
        ...

    @property
    def manifest(self) -> Manifest:
        """The tensors, as the replicas lay them out."""
        ...

    @property
    def tally(self) -> Tally:
        """What it holds. Complete once it was pushed."""
        ...

    async def push(
        self, port: WeightPort, push_id: str, *, relay: Sequence[RelayHop] = (), patience_seconds: float | None = None
    ) -> Sent:
        """Sends each element once, to be passed on along `relay`. For any number of pushes, also at once; never holds
        up the event loop.

        SteersmanError if a stream breaks, or the replica takes nothing for `patience_seconds`.
        """
        ...


class Delta(Cargo, Protocol):
    """What turns one image into the next. Made by a task of its own, and sent while it is made; whoever comes later
    gets it from the start.
    """

    @property
    def base_version(self) -> WeightVersion:
        """What it applies to."""
        ...

    @property
    def base_digest(self) -> bytes:
        """Of all weights of the base."""
        ...

    @property
    def digest(self) -> bytes:
        """Of all weights that it makes; empty until it is complete."""
        ...

    @property
    def max_bytes(self) -> int:
        """Of the data of one chunk."""
        ...

    @property
    def num_bytes(self) -> int:
        """Of chunk data, so far."""
        ...

    async def finish(self) -> None:
        """Returns once it is complete. SteersmanError if it was given up."""
        ...

    def cancel(self) -> None:
        """Gives it up, if it is not complete; who sends it gets an error."""
        ...

    async def seal(self) -> None:
        """Makes what is not made yet, and lets go of the images."""
        ...


@dataclass(frozen=True, kw_only=True)
class FullCargo:
    """All of `slices`, dense; each push converts them anew, a few chunks at a time."""

    slices: WeightSlices
    manifest: Manifest
    max_bytes: int
    base_version: None = None

    @property
    def version(self) -> WeightVersion:
        """Of the slices."""
        return self.slices.version

    @property
    def tally(self) -> Tally:
        """All elements held, none as a delta."""
        return Tally(elements=sum(self.slices.num_elements(spec) for spec in self.manifest))

    async def push(
        self, port: WeightPort, push_id: str, *, relay: Sequence[RelayHop] = (), patience_seconds: float | None = None
    ) -> Sent:
        """As in `Cargo`."""
        return await stream(port, push_id, self.chunks(), relay=relay, patience_seconds=patience_seconds)

    async def chunks(self) -> AsyncIterator[WeightChunk]:
        """All chunks, each element once, in ascending order."""
        chunks = self.slices.chunks(self.manifest, max_bytes=self.max_bytes)
        if self.slices.has_types(self.manifest):
            # A view and its checksum take less time than to hand them from thread to thread.
            for chunk in chunks:
                yield chunk
            return
        async for few in _made_ahead(chunks):
            for chunk in few:
                yield chunk


def dense_bytes(manifest: Manifest) -> int:
    """Bytes of all elements."""
    return sum(math.prod(spec.shape) * item_bytes(dtype_from_name(spec.dtype)) for spec in manifest)


class EncodedDelta:
    """What turns `base` into `new`, slices of the same elements, at replicas with this manifest: a `Delta`.

    What it holds are the bytes of its sparse chunks; dense chunks are made again for each reader, from `new`, which is
    held for their sake until `seal` has put them among the rest. `hash_all` gives `digest`, and is called once, in a
    thread.
    """

    def __init__(
        self,
        base: WeightSlices,
        new: WeightSlices,
        manifest: Manifest,
        *,
        base_digest: bytes,
        hash_all: Callable[[], bytes],
        max_bytes: int,
        encoding: PushEncoding,
        threads: Executor,
    ) -> None:
        self.version = new.version
        self.base_version = base.version
        self.manifest = manifest
        self.max_bytes = max_bytes
        self.base_digest = base_digest
        self.digest = b""
        self.num_bytes = 0
        self.tally = Tally()
        self._parts: list[WeightChunk | DensePart] = []
        self._new: WeightSlices | None = new
        self.is_empty = not any(new.num_elements(spec) for spec in manifest)
        self._grown = asyncio.Event()
        made = difference(base, new, manifest, encoding=encoding, max_bytes=max_bytes, threads=threads)
        self._task = asyncio.create_task(self._encode(made, hash_all))
        self._task.add_done_callback(self._ended)

    @property
    def is_complete(self) -> bool:
        """True if all of it is here."""
        return self._task.done() and not self._task.cancelled() and self._task.exception() is None

    async def finish(self) -> None:
        """As in `Delta`."""
        await asyncio.wait([self._task])
        self._check()

    def cancel(self) -> None:
        """As in `Delta`."""
        self._task.cancel()

    async def push(
        self, port: WeightPort, push_id: str, *, relay: Sequence[RelayHop] = (), patience_seconds: float | None = None
    ) -> Sent:
        """As in `Cargo`."""
        return await stream(port, push_id, self.chunks(), relay=relay, patience_seconds=patience_seconds)

    async def seal(self) -> None:
        """As in `Delta`."""
        new = self._new
        if new is not None and self.is_complete:
            parts = self._parts
            if any(isinstance(part, DensePart) for part in parts):
                parts = await asyncio.to_thread(lambda: [self._copy(part, new) for part in self._parts])
            self._parts, self._new = parts, None

    async def chunks(self) -> AsyncIterator[WeightChunk]:
        """All chunks, each element once, in ascending order. SteersmanError if the delta is given up meanwhile."""
        at = 0
        while True:
            few = self._parts[at : at + _CHUNKS_AHEAD]
            at += len(few)
            if not few:
                if self._task.done():
                    self._check()
                    return
                await self._grown.wait()
            new = self._new
            ready = [part for part in few if isinstance(part, WeightChunk)]
            if len(ready) < len(few):
                assert new is not None, "a sealed delta has no dense parts"
                ready = await asyncio.to_thread(lambda few, new: [self._chunk(part, new) for part in few], few, new)
            for chunk in ready:
                yield chunk

    async def _encode(self, made: Iterator[WeightChunk | DensePart], hash_all: Callable[[], bytes]) -> None:
        async for few in _made_ahead(made):
            self._parts += few
            for part in few:
                self.tally.count(part)
                self.num_bytes += len(part.data) if isinstance(part, WeightChunk) else self._size(part)
            self._wake()
        self.digest = await asyncio.to_thread(hash_all)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled():
            task.exception()  # readers raise it; there may be none
        self._wake()

    def _check(self) -> None:
        if self._task.cancelled():
            raise unavailable(f"the difference from {self.base_version} to {self.version} was given up")
        self._task.result()

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()

    def _chunk(self, part: WeightChunk | DensePart, new: WeightSlices) -> WeightChunk:
        return part if isinstance(part, WeightChunk) else new.chunk(part, self.manifest[part.tensor_index])

    def _copy(self, part: WeightChunk | DensePart, new: WeightSlices) -> WeightChunk:
        if isinstance(part, WeightChunk):
            return part
        chunk = self._chunk(part, new)
        return replace(chunk, data=bytes(chunk.data))  # else it may be a view that holds the slices

    def _size(self, part: DensePart) -> int:
        return part.num_elements * item_bytes(dtype_from_name(self.manifest[part.tensor_index].dtype))


async def _made_ahead(things: Iterator[T]) -> AsyncIterator[list[T]]:
    """The things, each few made by a thread while the few before are used."""

    def some() -> list[T]:
        return list(islice(things, _CHUNKS_AHEAD))

    coming = asyncio.create_task(asyncio.to_thread(some))
    try:
        while ready := await coming:
            coming = asyncio.create_task(asyncio.to_thread(some))
            yield ready
    finally:
        coming.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody wants it any more
