"""Who gets which elements, so that every tile has one holder."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.trainer.weights import shards
from steersman.trainer.weights.shards import Shard

TILE = 8


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "TILE_ELEMENTS", TILE)


@st.composite
def borders(draw: st.DrawFn) -> list[tuple[int, int]]:
    """What each rank holds of one tensor, in any order of ranks; some hold nothing."""
    size = draw(st.integers(0, 60))
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=4)))
    parts = list(zip([0, *cuts], [*cuts, size], strict=True))
    return draw(st.permutations(parts))


@settings(deadline=None)
@given(borders())
def test_every_tile_is_whole_and_comes_from_who_held_it(parts: list[tuple[int, int]]) -> None:
    size = max(end for _, end in parts)
    held = np.array([[part if part[0] < part[1] else (0, 0)] for part in parts], np.int64)
    cut = shards._cut(held, np.array([size]))
    known = [set(range(start, end)) for start, end in held[:, 0].tolist()]
    for move in shards._moves(held, cut):
        elements = set(range(move.start, move.end))
        assert elements <= known[move.source]
        assert move.source != move.target
        assert len(elements) < TILE
        known[move.target] |= elements
    covered: list[int] = []
    for rank, (start, end) in enumerate(cut[:, 0].tolist()):
        assert start % TILE == 0
        assert end % TILE == 0 or end == size
        assert set(range(start, end)) <= known[rank]
        covered += range(start, end)
    assert sorted(covered) == list(range(size))


def test_elements_that_two_hold_or_none_are_named() -> None:
    shard = Shard(names=("w", "tied"), shape=(4, 5), element_offset=0, elements=torch.empty(0))
    shards._require_cover(shard, np.array([[10, 20], [0, 10], [0, 0]]))
    with pytest.raises(ValueError, match="w of 20 elements: one rank's part ends at 10 and the next begins at 12"):
        shards._require_cover(shard, np.array([[0, 10], [12, 20]]))
    with pytest.raises(ValueError, match="ends at 12 and the next begins at 10"):
        shards._require_cover(shard, np.array([[0, 12], [10, 20]]))
    with pytest.raises(ValueError, match="ends at 10 and the next begins at 20"):
        shards._require_cover(shard, np.array([[0, 10], [0, 0]]))
