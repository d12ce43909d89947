"""What travels: all weights of an image, or the difference between two."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from steersman.client.types import WeightChunk
from steersman.trainer.weights.encode import PushEncoding, Tally, difference
from steersman.trainer.weights.image import Manifest, WeightImage
from steersman.wire.identity import WeightVersion

# Converted ahead of the stream: enough to keep it busy while a thread makes the next, small beside any model.
_CHUNKS_AHEAD: Final = 4


@dataclass(frozen=True, kw_only=True)
class FullCargo:
    """All weights of `image`, dense."""

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

    def chunks(self) -> AsyncIterator[WeightChunk]:
        """As in `Cargo`."""
        return made_ahead(self.image.chunks(self.manifest, max_bytes=self.max_bytes))


@dataclass(frozen=True, kw_only=True, eq=False)
class DeltaCargo:
    """What changed from `base` to `image`."""

    image: WeightImage
    base: WeightImage
    manifest: Manifest
    max_bytes: int
    encoding: PushEncoding
    threads: Executor
    tally: Tally = field(default_factory=Tally)

    @property
    def version(self) -> WeightVersion:
        """Of the image."""
        return self.image.version

    @property
    def base_version(self) -> WeightVersion:
        """Of the base."""
        return self.base.version

    def chunks(self) -> AsyncIterator[WeightChunk]:
        """As in `Cargo`."""
        chunks = difference(
            self.base,
            self.image,
            self.manifest,
            encoding=self.encoding,
            max_bytes=self.max_bytes,
            threads=self.threads,
        )
        return made_ahead(self.tally.count(chunks))


async def made_ahead(chunks: Iterator[WeightChunk]) -> AsyncIterator[WeightChunk]:
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
