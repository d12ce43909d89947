"""The digest is the one of the contract, and cannot be made of incomplete weights."""

import numpy as np
import pytest
import xxhash

from steersman.wire.weights.digest import DIGEST_BYTES, WeightDigest, chunk_checksum
from steersman.wire.weights.manifest import Manifest, TensorSpec

MANIFEST = Manifest.of(
    [
        TensorSpec(name="b.weight", shape=(3, 500_000), dtype="bfloat16"),
        TensorSpec(name="a.größe", shape=(), dtype="float32"),
        TensorSpec(name="c", shape=(0, 4), dtype="int8"),
    ]
)
SCALAR = np.array(1.5, np.float32)
MATRIX = (np.arange(1_500_000) % 65_521).astype(np.uint16).reshape(3, 500_000)
EMPTY = np.zeros((0, 4), np.int8)


def test_it_is_a_hash_over_names_and_little_endian_elements() -> None:
    digest = WeightDigest(MANIFEST)
    digest.add("a.größe", SCALAR.astype(">f4"))
    digest.add("b.weight", MATRIX)
    digest.add("c", EMPTY)
    text = "a.größe".encode() + b"\0" + SCALAR.tobytes() + b"b.weight\0" + MATRIX.tobytes() + b"c\0"
    assert digest.finish() == xxhash.xxh3_128(text).digest()
    assert len(digest.finish()) == DIGEST_BYTES


def test_bytes_and_arrays_are_the_same() -> None:
    digests = []
    for elements in (MATRIX, MATRIX.tobytes(), memoryview(MATRIX.tobytes())):
        digest = WeightDigest(MANIFEST)
        digest.add("a.größe", SCALAR)
        digest.add("b.weight", elements)
        digest.add("c", b"")
        digests.append(digest.finish())
    assert len(set(digests)) == 1


def test_order_size_and_completeness_are_checked() -> None:
    digest = WeightDigest(MANIFEST)
    with pytest.raises(ValueError, match=r"tensor is 'c', allowed: 'a.größe'"):
        digest.add("c", EMPTY)
    with pytest.raises(ValueError, match=r"a.größe has 8 bytes, allowed: 4"):
        digest.add("a.größe", np.zeros(2, np.float32))
    digest.add("a.größe", SCALAR)
    with pytest.raises(ValueError, match="contiguous"):
        digest.add("b.weight", MATRIX.T)
    digest.add("b.weight", MATRIX)
    with pytest.raises(ValueError, match="2 tensors were hashed, allowed: all 3"):
        digest.finish()
    digest.add("c", EMPTY)
    with pytest.raises(ValueError, match="none after the 3"):
        digest.add("d", EMPTY)


def test_the_checksum_of_a_chunk() -> None:
    assert chunk_checksum(b"steersman") == xxhash.xxh3_64_intdigest(b"steersman")
