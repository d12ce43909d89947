"""Weights that are large enough for deltas, and an optimiser's step on them."""

from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from steersman.policy.weights.manifest import HostManifest, TensorSpec
from steersman.wire.weights.chunks import DeltaOptions, Encoding, delta_chunks
from steersman.wire.weights.messages import Chunk

MANIFEST = HostManifest.of(
    [
        TensorSpec(name="embed", shape=(500, 600), dtype="bfloat16"),  # large enough for a thread
        TensorSpec(name="head", shape=(40, 50), dtype="float32"),
        TensorSpec(name="norm", shape=(3,), dtype="bfloat16"),  # too small for a delta
    ]
)
Weights = dict[str, NDArray[Any]]


def start() -> Weights:
    """Start-up weights; numpy has no bfloat16, so its bits."""
    generator = np.random.default_rng(0)
    return {
        "embed": generator.integers(0, 2**16, 300_000, np.uint16),
        "head": generator.standard_normal(2000).astype(np.float32),
        "norm": generator.integers(0, 2**16, 3, np.uint16),
    }


def stepped(weights: Weights, seed: int) -> Weights:
    """`weights` after a step that changes one element in twenty."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, old in weights.items():
        new = old.copy()
        bits = new.view(np.uint16 if old.itemsize == 2 else np.uint32)
        changed = generator.random(old.size) < 0.05
        bits[changed] += generator.integers(1, 3, int(changed.sum()), bits.dtype)
        found[name] = new
    return found


class DeltaSource:
    """Starts with `start()`."""

    manifest = MANIFEST

    def read_into(self, copy: memoryview) -> None:
        copy[:] = host_bytes(start())


def host_bytes(weights: Weights) -> bytes:
    """How `weights` lie in a host copy."""
    copy = bytearray(MANIFEST.nbytes)
    for slot in MANIFEST.slots:
        copy[slot.offset_bytes : slot.offset_bytes + slot.nbytes] = weights[slot.name].tobytes()
    return bytes(copy)


def contract_digest(weights: Weights) -> bytes:
    """The digest as the contract words it."""
    text = b""
    for name in sorted(weights):
        tiles = [weights[name][start : start + 131_072] for start in range(0, weights[name].size, 131_072)]
        text += name.encode() + b"\0" + b"".join(xxhash.xxh3_128_digest(tile.tobytes()) for tile in tiles)
    return xxhash.xxh3_128_digest(text)


def chunk_of(index: int, offset: int, num_elements: int, data: bytes, encoding: int = Encoding.SPARSE_DELTA) -> Chunk:
    """A chunk with its right checksum."""
    checksum = xxhash.xxh3_64_intdigest(data)
    return Chunk(
        tensor_index=index,
        element_offset=offset,
        num_elements=num_elements,
        data=data,
        checksum=checksum,
        encoding=encoding,
    )


def deltas(base: Weights, new: Weights, options: DeltaOptions | None = None) -> list[Chunk]:
    """All elements of `new`, against `base` where that is smaller."""
    return [
        chunk_of(index, chunk.element_offset, chunk.num_elements, chunk.data, chunk.encoding)
        for index, tensor in enumerate(MANIFEST.tensors)
        for chunk in delta_chunks(base[tensor.name], new[tensor.name], options=options)
    ]


def dense(new: Weights, num_elements: int = 100_000) -> list[Chunk]:
    """All elements of `new` as they are."""
    found = []
    for index, tensor in enumerate(MANIFEST.tensors):
        for offset in range(0, tensor.num_elements, num_elements):
            part = new[tensor.name][offset : offset + num_elements]
            found.append(chunk_of(index, offset, part.size, part.tobytes(), Encoding.DENSE))
    return found
