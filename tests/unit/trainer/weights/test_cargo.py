"""A delta that is encoded once and read by many, while it is made and after."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from steersman.client.types import TensorSpec, WeightChunk, WeightEncoding
from steersman.trainer.weights import cargo
from steersman.trainer.weights.cargo import EncodedDelta, FullCargo, dense_bytes
from steersman.trainer.weights.encode import PushEncoding
from steersman.trainer.weights.image import WeightImage
from steersman.wire.errors import SteersmanError
from steersman.wire.identity import WeightVersion
from steersman.wire.weights.delta import apply_delta

SIZE = 20_000
MANIFEST = tuple(TensorSpec(name=name, shape=(SIZE,), dtype="bfloat16") for name in "abc")


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


def pair(*shares: float) -> tuple[WeightImage, WeightImage]:
    generator = torch.Generator().manual_seed(0)
    old = {name: torch.randn(SIZE, generator=generator) for name in "abc"}
    new = {name: tensor.clone() for name, tensor in old.items()}
    for tensor, share in zip(new.values(), shares, strict=True):
        tensor[torch.rand(SIZE, generator=generator) < share] *= 1.01
    return WeightImage(WeightVersion(run_id="r", step=0), old), WeightImage(WeightVersion(run_id="r", step=1), new)


def encoded(base: WeightImage, new: WeightImage, threads: ThreadPoolExecutor) -> EncodedDelta:
    digest = base.digest(MANIFEST)
    return new.since(base, MANIFEST, base_digest=digest, max_bytes=4096, encoding=PushEncoding.AUTO, threads=threads)


async def read(delta: EncodedDelta) -> list[WeightChunk]:
    return [chunk async for chunk in delta.chunks()]


def rebuilt(base: WeightImage, chunks: list[WeightChunk]) -> list[np.ndarray]:
    arrays = [base.elements(spec).copy() for spec in MANIFEST]
    for chunk in chunks:
        span = arrays[chunk.tensor_index][chunk.element_offset : chunk.element_offset + chunk.num_elements]
        if chunk.encoding is WeightEncoding.SPARSE_DELTA:
            apply_delta(chunk.data, span)
        else:
            span[:] = np.frombuffer(chunk.data, span.dtype)
    return arrays


async def test_readers_get_the_same_chunks_while_it_is_made_after_and_sealed(threads: ThreadPoolExecutor) -> None:
    base, new = pair(0.01, 0.9, 0.05)
    delta = encoded(base, new, threads)
    early = await asyncio.gather(*(read(delta) for _ in range(3)))
    await delta.finish()
    late = await read(delta)
    await delta.seal()
    sealed = await read(delta)
    for chunks in (*early, late, sealed):
        for ours, spec in zip(rebuilt(base, chunks), MANIFEST, strict=True):
            np.testing.assert_array_equal(ours, new.elements(spec))
        assert sum(len(chunk.data) for chunk in chunks) == delta.num_bytes
    assert delta.digest == new.digest(MANIFEST)
    assert delta.tally.elements == 3 * SIZE
    assert delta.num_bytes < dense_bytes(MANIFEST)


async def test_what_was_sealed_does_not_hold_the_image(threads: ThreadPoolExecutor) -> None:
    base, new = pair(0.01, 0.9, 0.05)
    delta = encoded(base, new, threads)
    await delta.finish()
    expected = await read(delta)
    await delta.seal()
    new._slices["b"].elements.zero_()
    assert [bytes(chunk.data) for chunk in await read(delta)] == [bytes(chunk.data) for chunk in expected]


async def test_who_reads_a_delta_that_is_given_up_is_told(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, new = pair(0.01, 0.9, 0.05)
    cancelled = asyncio.Event()
    made_ahead = cargo._made_ahead

    async def stuck(things):
        async for few in made_ahead(things):
            yield few
            await cancelled.wait()

    monkeypatch.setattr(cargo, "_made_ahead", stuck)
    delta = encoded(base, new, threads)
    reading = asyncio.create_task(read(delta))
    while not delta.num_bytes:
        await asyncio.sleep(0)
    delta.cancel()
    with pytest.raises(SteersmanError, match="was given up"):
        await reading
    with pytest.raises(SteersmanError, match="was given up"):
        await delta.finish()
    assert not delta.is_complete


async def test_a_defect_of_the_encoder_reaches_who_reads(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_, **__):
        yield from ()
        raise RuntimeError("defect")

    monkeypatch.setattr(cargo, "difference", broken)
    delta = encoded(*pair(0.01, 0.9, 0.05), threads)
    with pytest.raises(RuntimeError, match="defect"):
        await read(delta)


async def test_full_cargo_is_equal_where_its_chunks_are() -> None:
    _, image = pair(0.0, 0.0, 0.0)
    one, same, other = (FullCargo(slices=image, manifest=MANIFEST, max_bytes=size) for size in (64, 64, 128))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    chunks = [chunk async for chunk in one.chunks()]
    assert max(len(chunk.data) for chunk in chunks) == 64
    assert one.tally.elements == sum(chunk.num_elements for chunk in chunks) == 3 * SIZE
