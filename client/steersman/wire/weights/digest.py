"""The digest of a complete set of weights, and the checksum of one chunk.

A digest is XXH3-128 over the tensors in manifest order: for each its name in UTF-8, one zero byte, its little-endian
elements. Trainer and policy compute it over what each holds in full, so it proves that the weights are the same, not
merely that what was sent has arrived. It guards against faults, not against an enemy: that is TLS's business.
"""

from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from steersman.wire.weights.manifest import Manifest

DIGEST_BYTES: Final = 16
_BLOCK_BYTES: Final = 1024 * 1024
"""Other threads get the interpreter between blocks; larger ones are no faster."""


def chunk_checksum(data: bytes | bytearray | memoryview) -> int:
    """XXH3-64 of a chunk's data."""
    return xxhash.xxh3_64_intdigest(data)


class WeightDigest:
    """Hashes tensors one by one, in manifest order, as they become complete.

    >>> digest = WeightDigest(Manifest.of([TensorSpec(name="norm", shape=(2,), dtype="bfloat16")]))
    >>> digest.add("norm", np.zeros(2, np.uint16))
    >>> digest.finish().hex()
    '...'
    """

    def __init__(self, manifest: Manifest) -> None:
        self._tensors = manifest.tensors
        self._next = 0
        self._hasher = xxhash.xxh3_128()

    def add(self, name: str, elements: NDArray[Any] | bytes | memoryview) -> None:
        """Hashes the next tensor: all its elements, as a contiguous array of any shape or as bytes.

        ValueError unless it is the next in the manifest and of its size.
        """
        if self._next == len(self._tensors):
            raise ValueError(f"tensor is {name!r}, allowed: none after the {self._next} of the manifest")
        spec = self._tensors[self._next]
        if name != spec.name:
            raise ValueError(f"tensor is {name!r}, allowed: {spec.name!r}, the next of the manifest")
        data = _as_bytes(elements)
        if data.size != spec.nbytes:
            raise ValueError(f"{name} has {data.size} bytes, allowed: {spec.nbytes} for {spec}")
        self._hasher.update(spec.name.encode() + b"\0")
        for start in range(0, data.size, _BLOCK_BYTES):
            self._hasher.update(data[start : start + _BLOCK_BYTES].data)
        self._next += 1

    def finish(self) -> bytes:
        """The digest. ValueError if tensors are missing."""
        if self._next != len(self._tensors):
            raise ValueError(f"{self._next} tensors were hashed, allowed: all {len(self._tensors)} of the manifest")
        return self._hasher.digest()


def _as_bytes(elements: NDArray[Any] | bytes | memoryview) -> NDArray[np.uint8]:
    if not isinstance(elements, np.ndarray):
        return np.frombuffer(elements, np.uint8)
    if not elements.flags.c_contiguous:
        raise ValueError(f"array is of strides {elements.strides}, allowed: contiguous")
    little = elements.astype(elements.dtype.newbyteorder("<"), copy=False)
    return little.reshape(-1).view(np.uint8)
