"""What a rank of a sharded trainer does for the lead: hashes, encodes and sends its own part of the weights."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from steersman.client.types import PushReceipt
from steersman.trainer.weights.cargo import EncodedDelta, FullCargo
from steersman.trainer.weights.crew import Answer
from steersman.trainer.weights.encode import PushEncoding
from steersman.trainer.weights.letters import hops_from_json, manifest_from_json, sent_to_json
from steersman.trainer.weights.ports import Connect, WeightPort
from steersman.trainer.weights.slices import WeightSlices
from steersman.trainer.weights.stream import Sent
from steersman.wire.errors import unavailable
from steersman.wire.idle import IdlePool

# As in the lead's history.
_ENCODER_THREADS: Final = 2
_IDLE_SECONDS: Final = 300.0
"""A connection is kept from one update to the next, as long as those come."""


class Servant:
    """The methods are the lead's commands, by name. Lives on one event loop; `close` it there.

    `images` are what was captured, by number; put there by the rank itself.
    """

    def __init__(self, connect: Connect) -> None:
        self.images: dict[int, WeightSlices] = {}
        self._deltas: dict[int, EncodedDelta] = {}
        self._ports: IdlePool[WeightPort] = IdlePool(connect, lambda port: port.close(), idle_seconds=_IDLE_SECONDS)
        self._threads = ThreadPoolExecutor(_ENCODER_THREADS, thread_name_prefix="steersman-encoder")
        self._commands: dict[str, Callable[..., Awaitable[Answer]]] = {
            "hash": self._hash,
            "push_full": self._push_full,
            "encode": self._encode,
            "finish": self._finish,
            "seal": self._seal,
            "push_delta": self._push_delta,
            "forget_image": self._forget_image,
            "forget_delta": self._forget_delta,
        }

    async def serve(self, name: str, arguments: dict[str, Any]) -> Answer:
        """Does what the lead says."""
        return await self._commands[name](**arguments)

    async def close(self) -> None:
        """Gives up what is not complete, and closes the connections."""
        for delta in self._deltas.values():
            delta.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._ports.close()

    async def _hash(self, image: int, manifest: Any) -> Answer:
        slices, specs = self.images[image], manifest_from_json(manifest)
        return None, await asyncio.to_thread(lambda: b"".join(slices.tile_digests(specs)))

    async def _encode(self, delta: int, base: int, image: int, manifest: Any, max_bytes: int, encoding: str) -> Answer:
        self._deltas[delta] = EncodedDelta(
            self.images[base],
            self.images[image],
            manifest_from_json(manifest),
            base_digest=b"",
            hash_all=lambda: b"",
            max_bytes=max_bytes,
            encoding=PushEncoding(encoding),
            threads=self._threads,
        )
        return None, b""

    async def _finish(self, delta: int) -> Answer:
        made = self._delta(delta)
        await made.finish()
        return [made.num_bytes, made.tally.elements, made.tally.delta_elements], b""

    async def _seal(self, delta: int) -> Answer:
        await self._delta(delta).seal()
        return None, b""

    async def _push_full(self, image: int, manifest: Any, max_bytes: int, **where: Any) -> Answer:
        cargo = FullCargo(slices=self.images[image], manifest=manifest_from_json(manifest), max_bytes=max_bytes)
        return await self._push(cargo, is_empty=not cargo.tally.elements, **where)

    async def _push_delta(self, delta: int, **where: Any) -> Answer:
        made = self._delta(delta)
        return await self._push(made, is_empty=made.is_empty, **where)

    async def _push(
        self,
        cargo: FullCargo | EncodedDelta,
        *,
        is_empty: bool,
        target: str,
        push_id: str,
        relay: Any,
        patience_seconds: float | None,
    ) -> Answer:
        if is_empty:  # the streams of the others tell what became of the route
            return sent_to_json(Sent(receipt=PushReceipt(received_bytes=0, num_chunks=0), num_bytes=0)), b""
        async with self._ports.lease(target) as port:
            hops = hops_from_json(relay)
            return sent_to_json(await cargo.push(port, push_id, relay=hops, patience_seconds=patience_seconds)), b""

    async def _forget_image(self, image: int) -> Answer:
        self.images.pop(image, None)
        return None, b""

    async def _forget_delta(self, delta: int) -> Answer:
        made = self._deltas.pop(delta, None)
        if made is not None:
            made.cancel()
        return None, b""

    def _delta(self, number: int) -> EncodedDelta:
        if (made := self._deltas.get(number)) is None:
            raise unavailable(f"delta {number} was given up")
        return made
