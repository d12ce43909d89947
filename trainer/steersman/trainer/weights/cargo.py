"""What travels: all weights of an image, or the difference between two, encoded once for all who need it."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final, TypeVar

from steersman.client.types import WeightChunk
from steersman.trainer.weights.encode import PushEncoding, Tally, difference
from steersman.trainer.weights.image import DensePart, Manifest, WeightImage
from steersman.wire.errors import unavailable
from steersman.wire.identity import WeightVersion
from steersman.wire.tensors import dtype_from_name, item_bytes

# Converted ahead of the stream: enough to keep it busy while a thread makes the next, small beside any model.
_CHUNKS_AHEAD: Final = 4

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FullCargo:
    """All weights of `image`, dense; each reader converts them anew, a few chunks at a time."""

    image: WeightImage
    manifest: Manifest
    max_bytes: int
    base_version: None = None

    @property
    def version(self) -> WeightVersion:
        """Of the image."""
        return self.image.version

    @property
    def tally(self) -> Tally:
        """All elements, none as a delta."""
        return Tally(elements=sum(math.prod(spec.shape) for spec in self.manifest))

    async def chunks(self) -> AsyncIterator[WeightChunk]:
        """As in `Cargo`."""
        chunks = self.image.chunks(self.manifest, max_bytes=self.max_bytes)
        if self.image.has_types(self.manifest):
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
    """What turns `base` into `image` at replicas with this manifest. Made by a task of its own, and read while it is
    made; whoever comes later reads it from the start.

    What it holds are the bytes of its sparse chunks; dense chunks are made again for each reader, from the image, which
    is held for their sake until `seal` has put them among the rest.

    Attributes:
        max_bytes: of the data of one chunk.
        base_digest: of all weights of the base.
        digest: of all weights that it makes; empty until it `is_complete`.
        num_bytes: of chunk data, so far.
    """

    def __init__(
        self,
        base: WeightImage,
        image: WeightImage,
        manifest: Manifest,
        *,
        base_digest: bytes,
        max_bytes: int,
        encoding: PushEncoding,
        threads: Executor,
    ) -> None:
        self.version = image.version
        self.base_version = base.version
        self.manifest = manifest
        self.max_bytes = max_bytes
        self.base_digest = base_digest
        self.digest = b""
        self.num_bytes = 0
        self.tally = Tally()
        self._parts: list[WeightChunk | DensePart] = []
        self._image: WeightImage | None = image
        self._grown = asyncio.Event()
        made = difference(base, image, manifest, encoding=encoding, max_bytes=max_bytes, threads=threads)
        self._task = asyncio.create_task(self._encode(made, image))
        self._task.add_done_callback(self._ended)

    @property
    def is_complete(self) -> bool:
        """True if all of it is here."""
        return bool(self.digest)

    async def finish(self) -> None:
        """Returns once it is complete. SteersmanError if it was given up."""
        await asyncio.wait([self._task])
        self._check()

    def cancel(self) -> None:
        """Gives it up, if it is not complete; who reads it gets an error."""
        self._task.cancel()

    async def seal(self) -> None:
        """Makes the dense chunks too and lets go of the image."""
        image = self._image
        if image is not None and self.is_complete:
            parts = self._parts
            if any(isinstance(part, DensePart) for part in parts):
                parts = await asyncio.to_thread(lambda: [self._copy(part, image) for part in self._parts])
            self._parts, self._image = parts, None

    async def chunks(self) -> AsyncIterator[WeightChunk]:
        """As in `Cargo`. SteersmanError if the delta is given up meanwhile."""
        at = 0
        while True:
            few = self._parts[at : at + _CHUNKS_AHEAD]
            at += len(few)
            if not few:
                if self._task.done():
                    self._check()
                    return
                await self._grown.wait()
            image = self._image
            ready = [part for part in few if isinstance(part, WeightChunk)]
            if len(ready) < len(few):
                assert image is not None, "a sealed delta has no dense parts"
                ready = await asyncio.to_thread(
                    lambda few, image: [self._chunk(part, image) for part in few], few, image
                )
            for chunk in ready:
                yield chunk

    async def _encode(self, made: Iterator[WeightChunk | DensePart], image: WeightImage) -> None:
        async for few in _made_ahead(made):
            self._parts += few
            for part in few:
                self.tally.count(part)
                self.num_bytes += len(part.data) if isinstance(part, WeightChunk) else self._size(part)
            self._wake()
        self.digest = await asyncio.to_thread(image.digest, self.manifest)

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

    def _chunk(self, part: WeightChunk | DensePart, image: WeightImage) -> WeightChunk:
        return part if isinstance(part, WeightChunk) else image.chunk(part, self.manifest[part.tensor_index])

    def _copy(self, part: WeightChunk | DensePart, image: WeightImage) -> WeightChunk:
        if isinstance(part, WeightChunk):
            return part
        chunk = self._chunk(part, image)
        return replace(chunk, data=bytes(chunk.data))  # else it may be a view that holds the image

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
