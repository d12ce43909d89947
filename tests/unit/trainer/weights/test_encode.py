"""What becomes of two images: chunks that cover every element once, and no effort where it does not pay."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import xxhash

from steersman.client.types import TensorSpec, WeightChunk, WeightEncoding
from steersman.trainer.weights.encode import PushEncoding, Tally, difference
from steersman.trainer.weights.image import DensePart, WeightImage
from steersman.wire.identity import WeightVersion
from steersman.wire.weights.delta import apply_delta

LARGE = 20_000


class Watched(WeightImage):
    """Notes which tensors were looked at."""

    def elements(self, spec: TensorSpec) -> np.ndarray:
        self.__dict__.setdefault("seen", []).append(spec.name)
        return super().elements(spec)


def pair(shares: dict[str, float], size: int = LARGE) -> tuple[Watched, WeightImage]:
    """Two versions; of each tensor so much changes."""
    generator = torch.Generator().manual_seed(0)
    old = {name: torch.randn(size, generator=generator) for name in shares}
    new = {name: tensor.clone() for name, tensor in old.items()}
    for name, share in shares.items():
        new[name][torch.rand(size, generator=generator) < share] *= 1.01
    return Watched(WeightVersion(run_id="r.1", step=0), old), WeightImage(WeightVersion(run_id="r.1", step=1), new)


def manifest(image: WeightImage, dtype: str = "bfloat16") -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=name, shape=tuple(t.shape), dtype=dtype) for name, t in image._tensors.items())


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


def encode(base, new, threads, *, encoding=PushEncoding.AUTO, dtype: str = "bfloat16") -> list[WeightChunk]:
    specs = manifest(new, dtype)
    parts = difference(base, new, specs, encoding=encoding, max_bytes=4096, threads=threads)
    return [new.chunk(part, specs[part.tensor_index]) if isinstance(part, DensePart) else part for part in parts]


def rebuilt(base: WeightImage, new: WeightImage, chunks: list[WeightChunk], dtype: str) -> list[np.ndarray]:
    arrays = [base.elements(spec).copy() for spec in manifest(new, dtype)]
    for chunk in chunks:
        assert len(chunk.data) <= 4096
        assert chunk.checksum == xxhash.xxh3_64_intdigest(chunk.data)
        array = arrays[chunk.tensor_index]
        span = array[chunk.element_offset : chunk.element_offset + chunk.num_elements]
        if chunk.encoding is WeightEncoding.SPARSE_DELTA:
            apply_delta(chunk.data, span)
        else:
            span[:] = np.frombuffer(chunk.data, span.dtype)
    return arrays


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("encoding", [PushEncoding.AUTO, PushEncoding.DELTA, PushEncoding.COMPACT])
def test_the_difference_makes_the_new_weights_bit_by_bit(threads, dtype: str, encoding: PushEncoding) -> None:
    base, new = pair({"a": 0.01, "b": 0.9, "c": 0.0, "d": 0.1})
    chunks = encode(base, new, threads, encoding=encoding, dtype=dtype)
    places = [(chunk.tensor_index, chunk.element_offset) for chunk in chunks]
    assert places == sorted(places)
    assert sum(chunk.num_elements for chunk in chunks) == 4 * LARGE
    for ours, spec in zip(rebuilt(base, new, chunks, dtype), manifest(new, dtype), strict=True):
        np.testing.assert_array_equal(ours, new.elements(spec))


def test_trying_ends_when_the_first_large_tensors_all_came_out_dense(threads) -> None:
    base, new = pair(dict.fromkeys("abcdefgh", 0.9))
    assert {chunk.encoding for chunk in encode(base, new, threads)} == {WeightEncoding.DENSE}
    assert base.seen == ["a", "b", "c"]
    base, new = pair(dict.fromkeys("abcdefgh", 0.9))
    encode(base, new, threads, encoding=PushEncoding.DELTA)
    assert base.seen == list("abcdefgh")


def test_one_dense_tensor_is_no_reason_to_stop(threads) -> None:
    base, new = pair({"a": 0.9, "b": 0.01, "c": 0.9, "d": 0.9, "e": 0.9, "f": 0.01})
    chunks = encode(base, new, threads)
    deltas = {chunk.tensor_index for chunk in chunks if chunk.encoding is WeightEncoding.SPARSE_DELTA}
    assert deltas == {1, 5}


def test_small_tensors_say_nothing_about_the_rest(threads) -> None:
    base, new = pair(dict.fromkeys("abcdef", 0.9), size=100)
    encode(base, new, threads)
    assert base.seen == list("abcdef")


def test_a_tally_counts_what_passes(threads) -> None:
    base, new = pair({"a": 0.01, "b": 0.9})
    tally = Tally()
    assert tally.delta_share == 0.0
    for part in difference(base, new, manifest(new), encoding=PushEncoding.AUTO, max_bytes=4096, threads=threads):
        tally.count(part)
    assert (tally.elements, tally.delta_share) == (2 * LARGE, 0.5)


def test_a_digest_is_over_names_and_elements_in_the_replicas_type() -> None:
    image, _ = pair({"b": 0.0, "a": 0.0})
    hasher = xxhash.xxh3_128()
    for name in ("b", "a"):
        hasher.update(name.encode() + b"\0")
        elements = image._tensors[name].to(torch.bfloat16)
        for start in range(0, elements.numel(), 131_072):
            tile = elements[start : start + 131_072].view(torch.uint8).numpy().tobytes()
            hasher.update(xxhash.xxh3_128_digest(tile))
    assert image.digest(manifest(image)) == hasher.digest()
    assert image.digest(manifest(image, "float32")) != hasher.digest()
