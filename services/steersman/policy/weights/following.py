"""The digest of a staging copy, made while the copy fills."""

import asyncio
from typing import Final

from steersman.policy.weights.manifest import HostManifest
from steersman.wire.weights.digest import WeightDigest

# A thousandth of a second's work: less is not worth a thread's while.
_MIN_BYTES: Final = 16 * 1024 * 1024


class FollowingDigest:
    """Hashes each tensor in a thread once it and all before it are complete; what came out of order is left to the end.

    Nothing may write to a tensor that is complete. All methods run on one event loop.
    """

    def __init__(self, manifest: HostManifest, copy: memoryview) -> None:
        self._manifest = manifest
        self._copy = copy
        self._digest = WeightDigest(manifest)
        self._missing = [tensor.num_elements for tensor in manifest.tensors]
        self._num_begun = 0
        self._task: asyncio.Task[None] | None = None

    def wrote(self, tensor_index: int, num_elements: int) -> None:
        """So many more elements of a tensor are as they will be."""
        self._missing[tensor_index] -= num_elements
        if self._task is None:
            self._follow()

    async def settle(self) -> None:
        """Waits until no thread reads the copy."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def finish(self) -> bytes:
        """The digest of the whole copy, as it is now. To be asked for once, when nothing is written any more."""
        await self.settle()
        begun, self._num_begun = self._num_begun, len(self._missing)
        await asyncio.to_thread(self._hash, begun, self._num_begun)
        return self._digest.finish()

    def _follow(self) -> None:
        begin = end = self._num_begun
        slots = self._manifest.slots
        while end < len(slots) and self._missing[end] == 0:
            end += 1
        if sum(slot.nbytes for slot in slots[begin:end]) >= _MIN_BYTES:
            self._num_begun = end
            self._task = asyncio.create_task(asyncio.to_thread(self._hash, begin, end))
            self._task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._task = None
        if not task.cancelled() and task.exception() is None:
            self._follow()

    def _hash(self, begin: int, end: int) -> None:
        for slot in self._manifest.slots[begin:end]:
            self._digest.add(slot.name, self._copy[slot.offset_bytes : slot.offset_bytes + slot.nbytes])
