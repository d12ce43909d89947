"""The digest of a complete set of weights, and the checksum of one chunk.

A tensor is hashed in tiles of TILE_ELEMENTS elements, the last one shorter; a tile's digest is the XXH3-128 of its
little-endian elements. The digest of the weights is the XXH3-128 over the tensors in manifest order: for each its name
in UTF-8, one zero byte, the digests of its tiles. The grid of tiles is part of the contract, so the digest is the same
whoever holds which part of a tensor, and tiles are hashed in any order, by any number of threads or processes.

Trainer and policy compute it over what each holds in full, so it proves that the weights are the same, not merely that
what was sent has arrived. It guards against faults, not against an enemy: that is TLS's business.
"""

from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from steersman.wire.weights.manifest import Manifest

DIGEST_BYTES: Final = 16
TILE_ELEMENTS: Final = 1 << 17
"""A quarter of a mebibyte of bfloat16. Smaller tiles cost calls and larger digests, larger ones are no faster, and
where a tile lies across the border of two shards one of their holders sends its part to the other.
"""


def chunk_checksum(data: bytes | bytearray | memoryview) -> int:
    """XXH3-64 of a chunk's data."""
    return xxhash.xxh3_64_intdigest(data)


def num_tiles(num_elements: int) -> int:
    """Tiles of so many elements."""
    return -(-num_elements // TILE_ELEMENTS)


def tile_digests(elements: NDArray[Any] | bytes | memoryview, item_bytes: int) -> bytes:
    """The digests of tiles that follow one another, joined: 16 bytes for each.

    `elements` begin where a tile begins and end where one ends; an array is contiguous, of any shape. Other threads get
    the interpreter between tiles.
    """
    data, step = _as_bytes(elements), TILE_ELEMENTS * item_bytes
    return b"".join(xxhash.xxh3_128_digest(data[start : start + step].data) for start in range(0, data.size, step))


class WeightDigest:
    """Joins the digests of tiles, which may come in any order, each once.

    >>> digest = WeightDigest(Manifest.of([TensorSpec(name="norm", shape=(2,), dtype="bfloat16")]))
    >>> digest.add("norm", np.zeros(2, np.uint16))
    >>> digest.finish().hex()
    '...'
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._tiles = [bytearray(DIGEST_BYTES * num_tiles(spec.num_elements)) for spec in manifest.tensors]
        self._missing = [len(tiles) for tiles in self._tiles]

    def add(self, name: str, elements: NDArray[Any] | bytes | memoryview) -> None:
        """Hashes all elements of one tensor. ValueError unless it is in the manifest and of its size."""
        index = self._manifest.index_of.get(name)
        if index is None:
            raise ValueError(f"tensor is {name!r}, allowed: one of the {len(self._tiles)} of the manifest")
        spec = self._manifest.tensors[index]
        data = _as_bytes(elements)
        if data.size != spec.nbytes:
            raise ValueError(f"{name} has {data.size} bytes, allowed: {spec.nbytes} for {spec}")
        self.put(index, 0, tile_digests(data, spec.item_bytes))

    def put(self, tensor_index: int, first_tile: int, digests: bytes) -> None:
        """Takes the joined digests of tiles of one tensor, from `first_tile` on. ValueError if it has fewer."""
        tiles, start = self._tiles[tensor_index], DIGEST_BYTES * first_tile
        if len(digests) % DIGEST_BYTES or not 0 <= start <= len(tiles) - len(digests):
            name = self._manifest.tensors[tensor_index].name
            found = f"{len(digests)} bytes of digests from tile {first_tile} on"
            raise ValueError(f"{name} has {found}, allowed: {len(tiles) // DIGEST_BYTES} tiles of {DIGEST_BYTES} bytes")
        tiles[start : start + len(digests)] = digests
        self._missing[tensor_index] -= len(digests)

    def finish(self) -> bytes:
        """The digest. ValueError unless every tile came once."""
        for spec, missing in zip(self._manifest.tensors, self._missing, strict=True):
            if missing:
                found = f"{missing // DIGEST_BYTES} tiles too few" if missing > 0 else "tiles that came twice"
                raise ValueError(f"{spec.name} has {found}, allowed: each of {num_tiles(spec.num_elements)} once")
        hasher = xxhash.xxh3_128()
        for spec, tiles in zip(self._manifest.tensors, self._tiles, strict=True):
            hasher.update(spec.name.encode() + b"\0")
            hasher.update(tiles)
        return hasher.digest()


def _as_bytes(elements: NDArray[Any] | bytes | memoryview) -> NDArray[np.uint8]:
    if not isinstance(elements, np.ndarray):
        return np.frombuffer(elements, np.uint8)
    if not elements.flags.c_contiguous:
        raise ValueError(f"array is of strides {elements.strides}, allowed: contiguous")
    little = elements.astype(elements.dtype.newbyteorder("<"), copy=False)
    return little.reshape(-1).view(np.uint8)
