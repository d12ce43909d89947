"""The digest is the one of the contract, and cannot be made of incomplete weights."""

import numpy as np
import pytest
import xxhash

from steersman.wire.weights.digest import DIGEST_BYTES, TILE_ELEMENTS, WeightDigest, chunk_checksum, tile_digests
from steersman.wire.weights.manifest import Manifest, TensorSpec

MANIFEST = Manifest.of(
    [
        TensorSpec(name="b.weight", shape=(3, 100_000), dtype="bfloat16"),
        TensorSpec(name="a.größe", shape=(), dtype="float32"),
        TensorSpec(name="c", shape=(0, 4), dtype="int8"),
    ]
)
SCALAR = np.array(1.5, np.float32)
MATRIX = (np.arange(300_000) % 65_521).astype(np.uint16).reshape(3, 100_000)
EMPTY = np.zeros((0, 4), np.int8)


def hashed(data: bytes) -> bytes:
    return xxhash.xxh3_128(data).digest()


def test_it_is_a_hash_over_names_and_hashes_of_tiles() -> None:
    digest = WeightDigest(MANIFEST)
    digest.add("a.größe", SCALAR.astype(">f4"))
    digest.add("b.weight", MATRIX)
    digest.add("c", EMPTY)
    data = MATRIX.tobytes()
    tiles = hashed(data[:262_144]) + hashed(data[262_144:524_288]) + hashed(data[524_288:])
    text = "a.größe".encode() + b"\0" + hashed(SCALAR.tobytes()) + b"b.weight\0" + tiles + b"c\0"
    assert digest.finish() == hashed(text)
    assert len(digest.finish()) == DIGEST_BYTES


def test_bytes_and_arrays_and_any_order_of_tiles_are_the_same() -> None:
    digests = []
    for elements in (MATRIX, MATRIX.tobytes(), memoryview(MATRIX.tobytes())):
        digest = WeightDigest(MANIFEST)
        digest.add("b.weight", elements)
        digest.add("a.größe", SCALAR)
        digest.add("c", b"")
        digests.append(digest.finish())
    digest = WeightDigest(MANIFEST)
    digest.put(1, 1, tile_digests(MATRIX.reshape(-1)[TILE_ELEMENTS:], 2))
    digest.put(0, 0, tile_digests(SCALAR, 4))
    digest.put(1, 0, tile_digests(MATRIX.reshape(-1)[:TILE_ELEMENTS], 2))
    assert {*digests, digest.finish()} == {digests[0]}


def test_names_sizes_and_completeness_are_checked() -> None:
    digest = WeightDigest(MANIFEST)
    with pytest.raises(ValueError, match=r"tensor is 'd', allowed: one of the 3"):
        digest.add("d", EMPTY)
    with pytest.raises(ValueError, match=r"a.größe has 8 bytes, allowed: 4"):
        digest.add("a.größe", np.zeros(2, np.float32))
    digest.add("a.größe", SCALAR)
    with pytest.raises(ValueError, match="contiguous"):
        digest.add("b.weight", MATRIX.T)
    digest.put(1, 0, bytes(2 * DIGEST_BYTES))
    with pytest.raises(ValueError, match="b.weight has 1 tiles too few, allowed: each of 3 once"):
        digest.finish()
    with pytest.raises(ValueError, match="from tile 2 on, allowed: 3 tiles of 16 bytes"):
        digest.put(1, 2, bytes(2 * DIGEST_BYTES))
    digest.put(1, 2, bytes(DIGEST_BYTES))
    digest.finish()
    digest.put(1, 2, bytes(DIGEST_BYTES))
    with pytest.raises(ValueError, match="tiles that came twice"):
        digest.finish()


def test_the_checksum_of_a_chunk() -> None:
    assert chunk_checksum(b"steersman") == xxhash.xxh3_64_intdigest(b"steersman")
