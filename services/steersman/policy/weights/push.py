"""One push under way: what it announced and what of it has arrived.

Invariants:

- an element of the staging copy is written by at most one chunk, and a delta at most once: a delta adds to what is
  there;
- a delta's span is copied from the serving copy just before it is applied, so that a refused chunk leaves no trace;
- nothing writes or reads any more once `settle` has returned and no chunk is let in.
"""

import asyncio
import time
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final

import numpy as np

from steersman.policy.weights.coverage import Coverage
from steersman.policy.weights.following import FollowingDigest
from steersman.policy.weights.manifest import HostManifest, TensorSpec
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.identity import WeightVersion
from steersman.wire.limits import WEIGHT_CHUNK_BYTES
from steersman.wire.weights.chunks import Encoding
from steersman.wire.weights.delta import MAX_SPAN_ELEMENTS, apply_delta
from steersman.wire.weights.digest import chunk_checksum
from steersman.wire.weights.errors import bad_chunk
from steersman.wire.weights.messages import Chunk

_INLINE_SPAN_BYTES: Final = 256 * 1024
"""Deltas of larger spans are applied in a thread: at 0.6 GB/s, the slowest, this takes half a millisecond."""


class Phase(Enum):
    """How far a push is."""

    RECEIVING = auto()
    VERIFYING = auto()
    STAGED = auto()


@dataclass(kw_only=True)
class Push:
    """Fills the staging copy. `touched` is when something last arrived, on the monotonic clock.

    `base` is the serving copy if the push named it as the base of its deltas.
    """

    push_id: str
    version: WeightVersion
    partial: bool
    idle_timeout_s: float
    manifest: HostManifest
    staging: memoryview
    base: memoryview | None = None
    phase: Phase = Phase.RECEIVING
    digest: bytes = b""
    began: float = field(default_factory=time.monotonic)
    touched: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._covered = [Coverage(tensor.num_elements) for tensor in self.manifest.tensors]
        self._writing: set[asyncio.Task[None]] = set()
        self._following = FollowingDigest(self.manifest, self.staging)

    def touch(self) -> None:
        """Renews the lease."""
        self.touched = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds since something arrived."""
        return time.monotonic() - self.touched

    async def write(self, chunk: Chunk) -> None:
        """Puts a chunk into the staging copy. A chunk that is refused leaves no trace.

        Raises WEIGHT_CHUNK_INVALID naming the field that is wrong.
        """
        tensor, start = self._check(chunk)
        covered = self._covered[chunk.tensor_index]
        end = chunk.element_offset + chunk.num_elements
        # Before anything is awaited, so that the same chunk on another stream finds its place taken.
        if not covered.add(chunk.element_offset, end):
            allowed = f"elements of {tensor.name} that have not arrived yet"
            raise bad_chunk("element_offset", f"[{chunk.element_offset}, {end})", allowed)
        self.touch()
        nbytes = chunk.num_elements * tensor.item_bytes
        if chunk.encoding == Encoding.DENSE:
            self.staging[start : start + nbytes] = chunk.data
            self._following.wrote(chunk.tensor_index, chunk.element_offset, chunk.num_elements)
            return
        # A caller that goes away does not stop the thread, and what comes after must know of it.
        task = asyncio.create_task(self._apply(chunk, start, tensor.item_bytes, covered))
        self._writing.add(task)
        task.add_done_callback(self._forget)
        await asyncio.shield(task)

    async def settle(self) -> None:
        """Waits until no thread writes to the staging copy, or reads it."""
        while self._writing:
            await asyncio.wait(self._writing)
        await self._following.settle()

    async def compute_digest(self) -> bytes:
        """The digest of the staging copy. To be asked for once, after `settle`, when no chunk is let in."""
        return await self._following.finish()

    def _check(self, chunk: Chunk) -> tuple[TensorSpec, int]:
        """The tensor of a chunk and the byte of the staging copy where it begins."""
        if self.phase is not Phase.RECEIVING:
            raise SteersmanError(Reason.WEIGHT_PUSH_NOT_ACTIVE, f"push {self.push_id!r} takes no more chunks")
        tensors = self.manifest.tensors
        if not 0 <= chunk.tensor_index < len(tensors):
            raise bad_chunk("tensor_index", chunk.tensor_index, f"[0, {len(tensors)})")
        tensor, slot = tensors[chunk.tensor_index], self.manifest.slots[chunk.tensor_index]
        end = chunk.element_offset + chunk.num_elements
        if chunk.num_elements < 1 or end > tensor.num_elements:
            span = f"[{chunk.element_offset}, {end})"
            allowed = f"at least one element within [0, {tensor.num_elements}) of {tensor.name}"
            raise bad_chunk("num_elements", span, allowed)
        if len(chunk.data) > WEIGHT_CHUNK_BYTES:
            raise bad_chunk("data", f"{len(chunk.data)} bytes", f"at most {WEIGHT_CHUNK_BYTES}")
        self._check_encoding(chunk, tensor)
        if (found := chunk_checksum(chunk.data)) != chunk.checksum:
            raise bad_chunk("checksum", f"{chunk.checksum:#018x}", f"{found:#018x}, the XXH3-64 of data")
        return tensor, slot.offset_bytes + chunk.element_offset * tensor.item_bytes

    def _check_encoding(self, chunk: Chunk, tensor: TensorSpec) -> None:
        if chunk.encoding == Encoding.DENSE:
            expected = chunk.num_elements * tensor.item_bytes
            if len(chunk.data) != expected:
                allowed = f"{expected} for {chunk.num_elements} elements of {tensor.dtype}"
                raise bad_chunk("data", f"{len(chunk.data)} bytes", allowed)
        elif chunk.encoding != Encoding.SPARSE_DELTA:
            raise bad_chunk("encoding", chunk.encoding, "WEIGHT_ENCODING_DENSE or WEIGHT_ENCODING_SPARSE_DELTA")
        elif self.base is None:
            raise bad_chunk("encoding", "a sparse delta", "WEIGHT_ENCODING_DENSE; the push names no base_version")
        elif chunk.num_elements > MAX_SPAN_ELEMENTS:
            raise bad_chunk("num_elements", chunk.num_elements, f"at most {MAX_SPAN_ELEMENTS} in a sparse delta")

    async def _apply(self, chunk: Chunk, start: int, item_bytes: int, covered: Coverage) -> None:
        assert self.base is not None
        end = start + chunk.num_elements * item_bytes
        work = chunk.data, self.base[start:end], self.staging[start:end], item_bytes
        if end - start <= _INLINE_SPAN_BYTES:
            error = _apply_to_base(*work)
        else:
            error = await asyncio.to_thread(_apply_to_base, *work)
        del work  # as in _apply_to_base: whoever keeps the error keeps this frame
        if error is not None:
            covered.discard(chunk.element_offset, chunk.element_offset + chunk.num_elements)
            raise error
        self.touch()
        self._following.wrote(chunk.tensor_index, chunk.element_offset, chunk.num_elements)

    def _forget(self, task: "asyncio.Task[None]") -> None:
        self._writing.discard(task)
        if not task.cancelled():
            task.exception()  # has been told to the caller, if there still is one

    def require_complete(self) -> None:
        """Raises WEIGHTS_INCOMPLETE naming the first element that is missing."""
        if self.partial:
            return
        for tensor, covered in zip(self.manifest.tensors, self._covered, strict=True):
            if (gap := covered.first_gap()) is not None:
                raise SteersmanError(
                    Reason.WEIGHTS_INCOMPLETE,
                    f"push {self.push_id!r}: element {gap} of tensor {tensor.name!r} has not arrived",
                )


def _apply_to_base(
    data: bytes | memoryview, base: memoryview, staging: memoryview, item_bytes: int
) -> SteersmanError | None:
    """Fills `staging` with `base` and the delta; returns what is wrong with the delta, if anything."""
    dtype: np.dtype[Any] = np.dtype(f"<u{item_bytes}")
    span = np.frombuffer(staging, dtype)
    np.copyto(span, np.frombuffer(base, dtype))
    try:
        apply_delta(data, span)
    except SteersmanError as error:
        # Its frames refer to the host copies, which could not be given back while somebody keeps the error.
        error.__context__ = None
        return error.with_traceback(None)
    return None
