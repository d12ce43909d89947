"""Where the tensors of a manifest lie in a host copy, and the digest of a copy.

A host copy holds the tensors in ascending order of name, each at a multiple of 64 bytes.
"""

from functools import cached_property
from typing import Final

from steersman.policy.engine.port import TensorSlot
from steersman.wire.weights.digest import WeightDigest
from steersman.wire.weights.manifest import Manifest, TensorSpec

__all__ = ["HostManifest", "TensorSpec", "digest"]

_ALIGNMENT: Final = 64
"""Bytes: a cache line, and a multiple of every element size."""


class HostManifest(Manifest):
    """All tensors of a model, in ascending order of name, and where each lies in a host copy."""

    @cached_property
    def slots(self) -> tuple[TensorSlot, ...]:
        """Where each tensor lies in a host copy."""
        slots, offset = [], 0
        for tensor in self.tensors:
            slots.append(
                TensorSlot(
                    name=tensor.name,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    offset_bytes=offset,
                    nbytes=tensor.nbytes,
                )
            )
            offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return tuple(slots)

    @property
    def nbytes(self) -> int:
        """Bytes of a host copy, gaps included; at least one."""
        last = self.slots[-1] if self.slots else None
        return max(1, last.offset_bytes + last.nbytes) if last else 1


def digest(manifest: HostManifest, copy: memoryview) -> bytes:
    """The digest of all tensors of a host copy, 16 bytes; see `steersman.wire.weights.digest`."""
    found = WeightDigest(manifest)
    for slot in manifest.slots:
        found.add(slot.name, copy[slot.offset_bytes : slot.offset_bytes + slot.nbytes])
    return found.finish()
