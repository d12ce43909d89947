"""The digest of a staging copy, made while the copy fills."""

import asyncio
from typing import Final

import numpy as np

from steersman.policy.weights.manifest import HostManifest
from steersman.wire.weights.digest import TILE_ELEMENTS, WeightDigest, num_tiles, tile_digests

# A thousandth of a second's work: less is not worth a thread's while.
_MIN_BYTES: Final = 16 * 1024 * 1024

Run = tuple[int, int, int]
"""Tensor index, first tile, and the one behind the last."""


class FollowingDigest:
    """Hashes tiles in a thread once they are complete, in whatever order that happens; few ones are left to the end.

    Nothing may write to a tile that is complete. All methods run on one event loop.
    """

    def __init__(self, manifest: HostManifest, copy: memoryview) -> None:
        self._manifest = manifest
        self._copy = copy
        self._digest = WeightDigest(manifest)
        self._missing = [_tile_sizes(tensor.num_elements) for tensor in manifest.tensors]
        self._is_begun = [np.zeros(missing.size, np.bool_) for missing in self._missing]
        self._ready: list[Run] = []
        self._ready_bytes = 0
        self._task: asyncio.Task[None] | None = None

    def wrote(self, tensor_index: int, element_offset: int, num_elements: int) -> None:
        """These elements of a tensor are as they will be."""
        end = element_offset + num_elements
        first, behind = element_offset // TILE_ELEMENTS, num_tiles(end)
        borders = np.arange(first, behind + 1) * TILE_ELEMENTS
        missing = self._missing[tensor_index][first:behind]
        missing -= np.diff(borders.clip(element_offset, end))
        for tile in (first + np.flatnonzero(missing == 0)).tolist():
            self._is_complete(tensor_index, tile)
        if self._task is None:
            self._follow()

    async def settle(self) -> None:
        """Waits until no thread reads the copy."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def finish(self) -> bytes:
        """The digest of the whole copy, as it is now. To be asked for once, when nothing is written any more."""
        self._ready_bytes = 0
        await self.settle()
        rest = [run for index, begun in enumerate(self._is_begun) for run in _runs(index, begun)]
        await asyncio.to_thread(self._hash, rest)
        return self._digest.finish()

    def _is_complete(self, tensor_index: int, tile: int) -> None:
        self._ready_bytes += TILE_ELEMENTS * self._manifest.tensors[tensor_index].item_bytes
        if self._ready and self._ready[-1][0] == tensor_index and self._ready[-1][2] == tile:
            self._ready[-1] = (tensor_index, self._ready[-1][1], tile + 1)
        else:
            self._ready.append((tensor_index, tile, tile + 1))

    def _follow(self) -> None:
        if self._ready_bytes < _MIN_BYTES:
            return
        runs, self._ready, self._ready_bytes = self._ready, [], 0
        for tensor_index, first, behind in runs:
            self._is_begun[tensor_index][first:behind] = True
        self._task = asyncio.create_task(asyncio.to_thread(self._hash, runs))
        self._task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._task = None
        if not task.cancelled() and task.exception() is None:
            self._follow()

    def _hash(self, runs: list[Run]) -> None:
        for tensor_index, first, behind in runs:
            tensor, slot = self._manifest.tensors[tensor_index], self._manifest.slots[tensor_index]
            start = slot.offset_bytes + first * TILE_ELEMENTS * tensor.item_bytes
            end = slot.offset_bytes + min(behind * TILE_ELEMENTS, tensor.num_elements) * tensor.item_bytes
            self._digest.put(tensor_index, first, tile_digests(self._copy[start:end], tensor.item_bytes))


def _tile_sizes(num_elements: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    borders = np.arange(num_tiles(num_elements) + 1) * TILE_ELEMENTS
    return np.diff(borders.clip(0, num_elements))


def _runs(tensor_index: int, begun: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> list[Run]:
    """The longest runs of tiles that nobody has begun to hash."""
    edges = np.flatnonzero(np.diff(begun, prepend=True, append=True)).tolist()
    return [(tensor_index, first, behind) for first, behind in zip(edges[::2], edges[1::2], strict=True)]
