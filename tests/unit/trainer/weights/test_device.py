"""What is packed where the weights are is what the host makes, to the byte. On the CPU: the operations are the same."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from steersman.client.types import TensorSpec, WeightChunk
from steersman.trainer.weights import device
from steersman.trainer.weights.device import pack_changes
from steersman.trainer.weights.encode import PushEncoding, difference
from steersman.trainer.weights.slices import DensePart, Slice, WeightSlices
from steersman.wire.identity import WeightVersion
from steersman.wire.weights.delta import apply_delta, encode_delta, encode_packed

CPU = torch.device("cpu")
Pair = tuple[NDArray[np.int16], NDArray[np.int16]]
# -0, the largest and smallest floats, infinities and NaNs, as bits of bfloat16.
SPECIAL = [0, -0x8000, 0x7F80, -0x80, 0x7FC0, 0x7FFF, -1, 1, -0x7FFF, 0x3F80]


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


@st.composite
def spans(draw: st.DrawFn, dtype: type = np.int16) -> Pair:
    """Old and new elements of one span: few changes or many, near and far, by small steps and by any."""
    seed = draw(st.integers(0, 2**32 - 1))
    size, density, share = (
        draw(st.integers(1, 3000)),
        draw(st.sampled_from([0, 0.002, 0.05, 0.6, 1])),
        draw(st.floats(0, 1)),
    )
    generator, info = np.random.default_rng(seed), np.iinfo(dtype)
    old = generator.integers(info.min, info.max, size, dtype, endpoint=True)
    is_changed = generator.random(size) < density
    moved = generator.choice(np.array([-2, -1, 1, 2], dtype), size)
    other = generator.integers(info.min, info.max, size, dtype, endpoint=True)
    if dtype is np.int16:
        other = np.where(generator.random(size) < 0.5, generator.choice(np.array(SPECIAL, dtype), size), other)
    new = np.where(generator.random(size) < share, old + moved, other).astype(dtype)
    return old, np.where(is_changed, new, old).astype(dtype)


def packed(pairs: list[Pair]) -> list[bytes | None]:
    return [encode_packed(one) for one in pack_changes([(torch.from_numpy(a), torch.from_numpy(b)) for a, b in pairs])]


@settings(deadline=None, max_examples=60)
@given(st.lists(spans(), min_size=1, max_size=5))
def test_spans_of_two_bytes_make_the_bytes_of_the_host(pairs: list[Pair]) -> None:
    found = packed(pairs)
    assert found == [encode_delta(old, new) for old, new in pairs]
    for (old, new), data in zip(pairs, found, strict=True):
        if data is not None:
            span = old.copy()
            apply_delta(data, span)
            np.testing.assert_array_equal(span, new)


@settings(deadline=None, max_examples=30)
@given(st.lists(spans(np.int8), min_size=1, max_size=5))
def test_spans_of_one_byte_make_the_bytes_of_the_host(pairs: list[Pair]) -> None:
    assert packed(pairs) == [encode_delta(old, new) for old, new in pairs]


def slices(step: int, tensors: dict[str, torch.Tensor], offset: int = 0) -> WeightSlices:
    held = {name: Slice(element_offset=offset, elements=tensor) for name, tensor in tensors.items()}
    return WeightSlices(WeightVersion(run_id="r", step=step), held)


def made(
    base: WeightSlices,
    new: WeightSlices,
    manifest: tuple[TensorSpec, ...],
    threads: ThreadPoolExecutor,
    encoding: PushEncoding = PushEncoding.DELTA,
    max_bytes: int = 4096,
    on: torch.device | None = None,
) -> list[WeightChunk | DensePart]:
    return list(difference(base, new, manifest, encoding=encoding, max_bytes=max_bytes, threads=threads, device=on))


@pytest.mark.parametrize("batch", [1000, 1 << 24])
@pytest.mark.parametrize("encoding", list(PushEncoding))
def test_a_model_makes_the_chunks_of_the_host(
    threads: ThreadPoolExecutor, encoding: PushEncoding, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_BATCH_ELEMENTS", batch)
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": 40_000, "b": 0, "c": 7, "d": 20_000, "e": 30_000, "f": 20_000, "wide": 5000, "same": 3000}
    dtypes = {"wide": "float32", "f": "float8_e4m3fn"}
    shares = {"a": 0.01, "c": 1.0, "d": 0.9, "e": 0.05, "f": 0.02, "wide": 0.1}
    old = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    new = {name: tensor.clone() for name, tensor in old.items()}
    for name, share in shares.items():
        # Denser at the end than a sample says, so that chunks are halved.
        density = torch.linspace(0, 2 * share, sizes[name]) ** 2 if name == "e" else torch.tensor(share)
        new[name][torch.rand(sizes[name], generator=generator) < density] *= 1.01
    manifest = tuple(TensorSpec(name=n, shape=(s,), dtype=dtypes.get(n, "bfloat16")) for n, s in sizes.items())
    base, image = slices(0, old, offset=131_072), slices(1, new, offset=131_072)
    host = made(base, image, manifest, threads, encoding)
    assert made(base, image, manifest, threads, encoding, on=CPU) == host
    assert {part.element_offset >= 131_072 for part in host} == {True}


def test_a_chunk_that_is_larger_than_its_sample_promised_is_halved(threads: ThreadPoolExecutor) -> None:
    size = 400_000
    old, new = torch.zeros(size, dtype=torch.bfloat16), torch.zeros(size, dtype=torch.bfloat16)
    runs = torch.linspace(0, size - 1024, 16).to(torch.int64)
    hidden = torch.ones(size, dtype=torch.bool)
    for run in runs.tolist():
        hidden[run : run + 1024] = False
    new[hidden & (torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.2)] = 1.5
    manifest = (TensorSpec(name="w", shape=(size,), dtype="bfloat16"),)
    host = made(slices(0, {"w": old}), slices(1, {"w": new}), manifest, threads)
    assert len(host) > 8
    assert made(slices(0, {"w": old}), slices(1, {"w": new}), manifest, threads, on=CPU) == host
