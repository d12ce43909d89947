"""One push under way: what it announced and what of it has arrived."""

import time
from dataclasses import dataclass, field
from enum import Enum, auto

import xxhash

from steersman.policy.weights.coverage import Coverage
from steersman.policy.weights.manifest import Manifest
from steersman.wire.errors import Reason, SteersmanError, invalid_field
from steersman.wire.identity import WeightVersion
from steersman.wire.limits import WEIGHT_CHUNK_BYTES


class Phase(Enum):
    """How far a push is."""

    RECEIVING = auto()
    VERIFYING = auto()
    STAGED = auto()


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Elements of one tensor. `checksum` is XXH3-64 of `data`."""

    tensor_index: int
    element_offset: int
    num_elements: int
    data: bytes
    checksum: int
    is_dense: bool = True


@dataclass(kw_only=True)
class Push:
    """Fills the staging copy. `touched` is when something last arrived, on the monotonic clock."""

    push_id: str
    version: WeightVersion
    partial: bool
    idle_timeout_s: float
    manifest: Manifest
    staging: memoryview
    phase: Phase = Phase.RECEIVING
    digest: bytes = b""
    began: float = field(default_factory=time.monotonic)
    touched: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._covered = [Coverage(tensor.num_elements) for tensor in self.manifest.tensors]

    def touch(self) -> None:
        """Renews the lease."""
        self.touched = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds since something arrived."""
        return time.monotonic() - self.touched

    def write(self, chunk: Chunk) -> None:
        """Puts a chunk into the staging copy. A chunk that is refused leaves no trace.

        Raises WEIGHT_CHUNK_INVALID naming the field that is wrong.
        """
        if self.phase is not Phase.RECEIVING:
            raise SteersmanError(Reason.WEIGHT_PUSH_NOT_ACTIVE, f"push {self.push_id!r} takes no more chunks")
        if not chunk.is_dense:
            raise _bad_chunk("encoding", "not dense", "WEIGHT_ENCODING_DENSE")
        tensors = self.manifest.tensors
        if not 0 <= chunk.tensor_index < len(tensors):
            raise _bad_chunk("tensor_index", chunk.tensor_index, f"[0, {len(tensors)})")
        tensor, slot = tensors[chunk.tensor_index], self.manifest.slots[chunk.tensor_index]
        end = chunk.element_offset + chunk.num_elements
        if chunk.num_elements < 1 or end > tensor.num_elements:
            span = f"[{chunk.element_offset}, {end})"
            allowed = f"at least one element within [0, {tensor.num_elements}) of {tensor.name}"
            raise _bad_chunk("num_elements", span, allowed)
        if len(chunk.data) > WEIGHT_CHUNK_BYTES:
            raise _bad_chunk("data", f"{len(chunk.data)} bytes", f"at most {WEIGHT_CHUNK_BYTES}")
        expected = chunk.num_elements * tensor.item_bytes
        if len(chunk.data) != expected:
            allowed = f"{expected} for {chunk.num_elements} elements of {tensor.dtype}"
            raise _bad_chunk("data", f"{len(chunk.data)} bytes", allowed)
        if (found := xxhash.xxh3_64_intdigest(chunk.data)) != chunk.checksum:
            raise _bad_chunk("checksum", f"{chunk.checksum:#018x}", f"{found:#018x}, the XXH3-64 of data")
        if not self._covered[chunk.tensor_index].add(chunk.element_offset, end):
            allowed = f"elements of {tensor.name} that have not arrived yet"
            raise _bad_chunk("element_offset", f"[{chunk.element_offset}, {end})", allowed)
        start = slot.offset_bytes + chunk.element_offset * tensor.item_bytes
        self.staging[start : start + expected] = chunk.data
        self.touch()

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


def _bad_chunk(field_name: str, value: object, allowed: str) -> SteersmanError:
    return invalid_field(f"chunk.{field_name}", value, allowed, reason=Reason.WEIGHT_CHUNK_INVALID)
