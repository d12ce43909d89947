"""The deltas of the last versions, so that a replica that stayed behind gets what it missed, not everything.

Invariants:

- A delta is encoded once, when its version is published, for each layout that a replica has shown; all replicas get
  the same bytes, and the versions before need not be kept for it.
- A chain has no gaps: each delta starts from the weights that the one before it made.
- Beside the newest delta, a chain holds no more bytes than the settings allow, and never more than the dense weights:
  beyond those it would be of no use.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from steersman.client.types import WeightSnapshot
from steersman.trainer.weights.cargo import Delta, dense_bytes
from steersman.trainer.weights.encode import MIN_DELTA_CHUNK_BYTES, PushEncoding
from steersman.trainer.weights.image import Image, Manifest
from steersman.wire.identity import WeightVersion

MAX_LINKS: Final = 32
"""Each link is a transaction of its own, which hashes all weights: more take longer than one push of everything."""
# Encoders release the interpreter; more would take cores from the trainer for a link that is busy already.
_ENCODER_THREADS: Final = 2


class Link(Protocol):
    """A delta of a chain."""

    @property
    def base_version(self) -> WeightVersion:
        """What it applies to."""
        ...

    @property
    def base_digest(self) -> bytes:
        """Of the weights that it applies to."""
        ...

    @property
    def num_bytes(self) -> int:
        """What it costs to send."""
        ...


L = TypeVar("L", bound=Link)


def choose_route(links: Sequence[L], active: WeightSnapshot, full_bytes: int) -> Sequence[L]:
    """The links that lead from the active weights to where the chain ends; none if all weights are to be sent.

    That is so where no link starts at the active weights, to the bit, and where together they are not smaller than
    `full_bytes`.
    """
    starts = [at for at, link in enumerate(links) if link.base_version == active.version]
    # A version names one set of weights, so there is one start at most.
    if not starts or links[starts[0]].base_digest != active.digest:
        return ()
    route = links[starts[0] :]
    return route if sum(link.num_bytes for link in route) < full_bytes else ()


@dataclass(kw_only=True)
class _Chain:
    full_bytes: int
    max_chunk_bytes: int
    num_idle: int = 0
    links: list[Delta] = field(default_factory=list)


class DeltaHistory:
    """A chain of deltas for each layout of the weights. Lives on one event loop; `close` it.

    Args:
        encoding: DENSE keeps nothing.
        max_bytes: of deltas before the newest, for each layout.
    """

    def __init__(self, encoding: PushEncoding, *, max_bytes: int) -> None:
        self._encoding = encoding
        self._max_bytes = max_bytes
        self._chains: dict[Manifest, _Chain] = {}
        self._threads = ThreadPoolExecutor(_ENCODER_THREADS, thread_name_prefix="steersman-encoder")

    def note(self, manifest: Manifest, max_chunk_bytes: int) -> None:
        """Says that a replica lays the weights out like this and takes chunks of so many bytes: deltas of versions to
        come are made for it.
        """
        if self._encoding is PushEncoding.DENSE:
            return
        chain = self._chains.get(manifest)
        if chain is None:
            self._chains[manifest] = _Chain(full_bytes=dense_bytes(manifest), max_chunk_bytes=max_chunk_bytes)
        else:
            chain.max_chunk_bytes = min(chain.max_chunk_bytes, max_chunk_bytes)
            chain.num_idle = 0

    async def extend(self, base: Image, image: Image) -> None:
        """Begins to encode what turns `base` into `image`. What was encoded from `base` to a version that has been
        given up since is forgotten, and so is a layout that no replica has shown for MAX_LINKS versions.
        """
        for manifest, chain in list(self._chains.items()):
            chain.num_idle += 1
            if chain.num_idle > MAX_LINKS:
                del self._chains[manifest]
        await asyncio.gather(*(self._extend(manifest, chain, base, image) for manifest, chain in self._chains.items()))

    async def route(self, manifest: Manifest, active: WeightSnapshot, goal: WeightVersion) -> Sequence[Delta]:
        """The deltas that make `goal` of the active weights, in order; none if all weights are to be sent instead."""
        chain = self._chains.get(manifest)
        if chain is None:
            return ()
        chain.num_idle = 0
        ends = [at for at, link in enumerate(chain.links) if link.version == goal]
        links = chain.links[: ends[0] + 1] if ends else []
        if links and links[-1].base_version != active.version and choose_route(links, active, chain.full_bytes):
            # A single link is never larger than everything, and is sent while it is made; a chain must be weighed.
            await links[-1].finish()
        return choose_route(links, active, chain.full_bytes)

    def close(self) -> None:
        """Forgets everything and ends the encoder's threads. Pushes that read a delta which is not complete fail."""
        for chain in self._chains.values():
            for link in chain.links:
                link.cancel()
        self._chains.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _extend(self, manifest: Manifest, chain: _Chain, base: Image, image: Image) -> None:
        while chain.links and chain.links[-1].version != base.version:
            last = chain.links[-1]
            if (last.base_version, last.version) == (base.version, image.version):
                return
            chain.links.pop().cancel()
        if chain.links:
            # A gap would cost whoever stayed behind all weights; the encoders are busy until then anyway.
            await chain.links[-1].finish()
        self._trim(chain)
        if chain.links:
            await chain.links[-1].seal()
        if chain.max_chunk_bytes < MIN_DELTA_CHUNK_BYTES:
            chain.links.clear()
            return
        chain.links.append(
            image.since(
                base,
                manifest,
                base_digest=await asyncio.to_thread(base.digest, manifest),
                max_bytes=chain.max_chunk_bytes,
                encoding=self._encoding,
                threads=self._threads,
            )
        )

    def _trim(self, chain: _Chain) -> None:
        limit, links = min(self._max_bytes, chain.full_bytes), chain.links
        while links and (len(links) >= MAX_LINKS or sum(link.num_bytes for link in links) > limit):
            links.pop(0)
