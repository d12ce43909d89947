from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.trainer.data.batches import micro_batches, packs, passes, share_out
from steersman.trainer.data.order import EpochOrder, split_indices


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 3))
def test_each_epoch_holds_every_record_once(num_records, batch_size, epoch):
    order = EpochOrder(num_records, batch_size=batch_size, seed=1)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    assert sorted(n for step in steps for n in order.batch(step)) == list(range(num_records))


def test_order_is_a_function_of_seed_and_step_alone():
    order = EpochOrder(50, batch_size=8, seed=3)
    straight = [order.batch(step) for step in range(20)]
    assert EpochOrder(50, batch_size=8, seed=3).batch(17) == straight[17]
    assert order.batch(2) == straight[2]
    assert EpochOrder(50, batch_size=8, seed=4).batch(0) != straight[0]
    assert straight[0] != straight[order.steps_per_epoch]


def test_split_is_disjoint_whole_and_the_same_each_time():
    train, held_out = split_indices(20, held_out=5, seed=9)
    assert len(held_out) == 5
    assert sorted(train + held_out) == list(range(20))
    assert split_indices(20, held_out=5, seed=9) == (train, held_out)
    with pytest.raises(ValueError, match="held_out is 20"):
        split_indices(20, held_out=20, seed=0)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 4)), max_size=30), st.integers(1, 200))
def test_micro_batches_hold_every_item_once_within_the_budget(items, token_budget):
    lengths, rows = [n for n, _ in items], [r for _, r in items]
    groups = micro_batches(lengths, token_budget=token_budget, rows=rows)
    assert sorted(item for group in groups for item in group) == list(range(len(items)))
    for group in groups:
        padded = max(lengths[i] for i in group) * sum(rows[i] for i in group)
        assert padded <= token_budget or len(group) == 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(0, 60))
def test_micro_batches_pad_no_more_than_allowed(lengths, max_padding):
    groups = micro_batches(lengths, token_budget=10_000, max_padding=max_padding)
    assert sorted(item for group in groups for item in group) == list(range(len(lengths)))
    for group, following in zip(groups, [*groups[1:], []], strict=True):
        longest = lengths[group[0]]
        padding = sum(longest - lengths[i] for i in group)
        assert padding <= max_padding
        # No group is closed too soon.
        assert not following or padding + longest - lengths[following[0]] > max_padding


def test_micro_batches_put_like_lengths_together():
    assert micro_batches([3, 90, 4, 100], token_budget=200) == [[3, 1], [2, 0]]
    assert micro_batches([], token_budget=1) == []
    with pytest.raises(ValueError, match="token_budget is 0"):
        micro_batches([1], token_budget=0)


ITEMS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 4)), min_size=1, max_size=40)


@given(ITEMS, st.integers(1, 200), st.integers(1, 5))
def test_ranks_make_as_many_passes_and_every_item_counts_once(items, token_budget, num_ranks):
    lengths, rows = [item[0] for item in items], [item[1] for item in items]
    of_ranks = [
        passes(lengths, token_budget=token_budget, rows=rows, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    assert len({len(made) for made in of_ranks}) == 1
    counted = [item for made in of_ranks for one in made if one.counts for item in one.items]
    assert sorted(counted) == list(range(len(items)))
    for together in zip(*of_ranks, strict=True):
        assert all(one.items for one in together)
        assert len({one.num_tokens for one in together}) == 1
        assert together[0].num_tokens == tuple(
            sum(rows[n] for n in one.items) * max(lengths[n] for n in one.items) for one in together
        )
    # What does not count is the least that there is.
    idle = {tuple(one.items) for made in of_ranks for one in made if not one.counts}
    least = min(length * count for length, count in items)
    assert all(len(chosen) == 1 and lengths[chosen[0]] * rows[chosen[0]] == least for chosen in idle)


@given(ITEMS, st.integers(1, 200))
def test_on_one_rank_passes_are_the_micro_batches(items, token_budget):
    lengths, rows = [item[0] for item in items], [item[1] for item in items]
    made = passes(lengths, token_budget=token_budget, rows=rows, max_padding=30)
    assert [one.items for one in made] == micro_batches(lengths, token_budget=token_budget, rows=rows, max_padding=30)
    assert all(one.counts for one in made)


@given(ITEMS, st.integers(1, 200), st.integers(1, 5))
def test_packs_hold_every_item_once_and_no_padding(items, token_budget, num_ranks):
    lengths, rows = [item[0] for item in items], [item[1] for item in items]
    groups = packs(lengths, token_budget=token_budget)
    assert sorted(item for group in groups for item in group) == list(range(len(items)))
    assert all(sum(lengths[i] for i in group) <= token_budget or len(group) == 1 for group in groups)
    # No group is closed too soon.
    assert all(sum(lengths[i] for i in one) + lengths[other[0]] > token_budget for one, other in pairwise(groups))
    of_ranks = [
        passes(lengths, token_budget=token_budget, rows=rows, packed=True, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    counted = [item for made in of_ranks for one in made if one.counts for item in one.items]
    assert sorted(counted) == list(range(len(items)))
    for together in zip(*of_ranks, strict=True):
        assert together[0].num_tokens == tuple(sum(lengths[n] for n in one.items) for one in together)
    with pytest.raises(ValueError, match="token_budget is 0"):
        packs(lengths, token_budget=0)


def test_shares_cost_alike():
    assert share_out([9, 1, 1, 1, 1, 5, 1, 1], 2) == [[0, 6], [1, 2, 3, 4, 5, 7]]
    assert share_out([3], 3) == [[0], [], []]
    assert share_out([4, 2, 3], 1) == [[0, 1, 2]]
