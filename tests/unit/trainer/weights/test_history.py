"""Which deltas are kept, and which of them lead to the wanted weights."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from steersman.client.types import TensorSpec, WeightSnapshot
from steersman.trainer.weights.cargo import dense_bytes
from steersman.trainer.weights.encode import PushEncoding
from steersman.trainer.weights.history import MAX_LINKS, DeltaHistory, choose_route
from steersman.trainer.weights.image import WeightImage
from steersman.wire.identity import WeightVersion

SIZE = 40_000
MANIFEST = (TensorSpec(name="w", shape=(SIZE,), dtype="bfloat16"),)


@dataclass(frozen=True)
class Link:
    base_version: WeightVersion
    base_digest: bytes
    num_bytes: int


def version(step: int) -> WeightVersion:
    return WeightVersion(run_id="demo.1", step=step)


def digest(step: int) -> bytes:
    return step.to_bytes(16, "big")


def links(sizes: list[int]) -> list[Link]:
    return [Link(version(step), digest(step), size) for step, size in enumerate(sizes)]


def active(step: int, *, same: bool = True) -> WeightSnapshot:
    return WeightSnapshot(version=version(step), digest=digest(step if same else step + 100))


SIZES = st.lists(st.integers(0, 50), max_size=8)


@given(SIZES, st.integers(0, 9), st.booleans(), st.integers(0, 200))
def test_a_route_leads_from_the_active_weights_to_the_end_and_is_smaller_than_everything(
    sizes: list[int], step: int, same: bool, full_bytes: int
) -> None:
    chain = links(sizes)
    route = choose_route(chain, active(step, same=same), full_bytes)
    wanted = chain[step:]
    is_way = bool(wanted) and same and sum(link.num_bytes for link in wanted) < full_bytes
    assert list(route) == (wanted if is_way else [])


def test_the_weights_that_a_chain_makes_have_no_way_to_go() -> None:
    assert choose_route(links([1, 1]), active(2), 100) == ()


def images(count: int, share: float = 0.02) -> list[WeightImage]:
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(SIZE, generator=generator)
    made = []
    for step in range(count):
        made.append(WeightImage(version(step), {"w": tensor.clone()}))
        tensor[torch.rand(SIZE, generator=generator) < share] *= 1.01
    return made


@asynccontextmanager
async def history(
    encoding: PushEncoding = PushEncoding.AUTO, *, max_bytes: int = 2**20, max_chunk_bytes: int = 4096
) -> AsyncIterator[DeltaHistory]:
    made = DeltaHistory(encoding, max_bytes=max_bytes)
    made.note(MANIFEST, max_chunk_bytes)
    try:
        yield made
    finally:
        made.close()


def snapshot(image: WeightImage) -> WeightSnapshot:
    return WeightSnapshot(version=image.version, digest=image.digest(MANIFEST))


async def extended(kept: DeltaHistory, made: list[WeightImage]) -> None:
    for base, image in pairwise(made):
        await kept.extend(base, image)


async def length(kept: DeltaHistory, made: list[WeightImage]) -> int:
    """Links from the earliest version that there is a way from."""
    routes = [await kept.route(MANIFEST, snapshot(start), made[-1].version) for start in made]
    return max(map(len, routes))


async def test_a_route_is_contiguous_and_ends_at_the_goal() -> None:
    made = images(5)
    async with history() as kept:
        await extended(kept, made)
        route = await kept.route(MANIFEST, snapshot(made[1]), made[3].version)
        assert [(link.base_version.step, link.version.step) for link in route] == [(1, 2), (2, 3)]
        assert [link.digest for link in route] == [image.digest(MANIFEST) for image in made[2:4]]
        assert not await kept.route(MANIFEST, snapshot(made[4]), made[3].version)
        assert not await kept.route(MANIFEST, snapshot(made[0]), version(9))


async def test_the_bytes_of_late_deltas_are_bounded_by_the_setting_and_by_the_weights() -> None:
    made = images(12)
    async with history(max_bytes=2**30) as kept:
        await extended(kept, made)
        (link,) = await kept.route(MANIFEST, snapshot(made[-2]), made[-1].version)
        await link.finish()
        assert await length(kept, made) == 11
        assert link.num_bytes < dense_bytes(MANIFEST) / 11
    async with history(max_bytes=3 * link.num_bytes + link.num_bytes // 2) as kept:
        await extended(kept, made)
        assert await length(kept, made) in (3, 4, 5)  # those before the newest, which differ a little
    # A dense delta leaves no room for another one.
    changed = images(4, share=0.98)
    async with history(PushEncoding.AUTO, max_bytes=2**30) as kept:
        await extended(kept, changed)
        for chain in kept._chains.values():
            assert sum(one.num_bytes for one in chain.links[:-1]) <= dense_bytes(MANIFEST)


async def test_the_number_of_links_is_bounded() -> None:
    made = images(MAX_LINKS + 5, share=0.0001)
    async with history() as kept:
        await extended(kept, made[:10])
        kept.note(MANIFEST, 4096)
        await extended(kept, made[9:])
        assert await length(kept, made) == MAX_LINKS


async def test_a_version_that_was_given_up_is_forgotten_and_one_that_is_tried_again_is_not_encoded_again() -> None:
    made = images(4)
    async with history() as kept:
        await kept.extend(made[0], made[1])
        await kept.extend(made[1], made[2])
        (before,) = await kept.route(MANIFEST, snapshot(made[1]), made[2].version)
        await kept.extend(made[1], made[2])
        (again,) = await kept.route(MANIFEST, snapshot(made[1]), made[2].version)
        assert again is before
        await kept.extend(made[1], made[3])
        assert not await kept.route(MANIFEST, snapshot(made[1]), made[2].version)
        route = await kept.route(MANIFEST, snapshot(made[0]), made[3].version)
        assert [link.version.step for link in route] == [1, 3]


async def test_a_gap_ends_a_chain() -> None:
    made = images(4)
    async with history() as kept:
        await kept.extend(made[0], made[1])
        await kept.extend(made[2], made[3])
        assert not await kept.route(MANIFEST, snapshot(made[0]), made[3].version)
        assert len(await kept.route(MANIFEST, snapshot(made[2]), made[3].version)) == 1


async def test_nothing_is_encoded_for_dense_or_for_tiny_chunks() -> None:
    made = images(2)
    async with history(PushEncoding.DENSE) as kept:
        await kept.extend(*made)
        assert not await kept.route(MANIFEST, snapshot(made[0]), made[1].version)
    async with history(max_chunk_bytes=512) as kept:
        await kept.extend(*made)
        assert not await kept.route(MANIFEST, snapshot(made[0]), made[1].version)


async def test_a_layout_that_no_replica_shows_any_more_is_forgotten() -> None:
    made = images(MAX_LINKS + 3, share=0.0001)
    async with history() as kept:
        await extended(kept, made[:3])
        assert await kept.route(MANIFEST, snapshot(made[1]), made[2].version)
        await extended(kept, made[2:])
        assert await kept.route(MANIFEST, snapshot(made[-2]), made[-1].version)
        await extended(
            kept, [*made[-1:], *(WeightImage(version(100 + step), {"w": torch.zeros(SIZE)}) for step in range(34))]
        )
        assert not await kept.route(MANIFEST, snapshot(made[-1]), version(133))
        assert not kept._chains
