"""Where batches are cut, with the cost of a batch counted by hand."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from steersman.serving.arrangement import ByLength, ByPrefix, Tally
from steersman.serving.batch_settings import BatchingSettings
from steersman.serving.packing import pack_rows

PROMPTS = [np.arange(100 * index, 100 * index + 40, dtype=np.int32) for index in range(4)]
BY_PREFIX = ByPrefix[np.ndarray](lambda row: row)


def answers(prompt: int, lengths: list[int]) -> list[np.ndarray]:
    return [
        np.concatenate([PROMPTS[prompt], np.full(length, 1000 + index, np.int32)])
        for index, length in enumerate(lengths)
    ]


def batches_of(rows: list[np.ndarray], num_workers: int = 1, **settings) -> list[list[np.ndarray]]:
    """All batches of a wave."""
    plan = BY_PREFIX.plan(rows, [len(row) for row in rows], BatchingSettings(**settings), num_workers)
    assert sorted(index for batch in plan for index in batch) == list(range(len(rows)))
    return [[rows[index] for index in batch] for batch in plan]


def count(rows: list[np.ndarray]) -> Tally:
    return BY_PREFIX.count(rows, [len(row) for row in rows])


def num_computed(rows: list[np.ndarray]) -> int:
    return sum(map(len, rows)) - count(rows).num_shared_tokens


def test_by_length_counts_padding():
    settings = BatchingSettings(max_batch_tokens=100, batch_overhead_tokens=1000)
    assert ByLength().plan("abc", [1, 3, 2], settings) == [[1, 2, 0]]
    assert ByLength().plan("abcd", [40, 30, 10, 5], settings) == [[0, 1], [2, 3]]
    assert ByLength().plan("a", [500], settings) == [[0]]
    assert ByLength().count("ab", [40, 30]) == Tally(num_padding_tokens=10)


def test_a_batch_holds_no_more_items_than_it_may():
    settings = BatchingSettings(max_batch_items=2)
    assert ByLength().plan("abcde", [5, 4, 3, 2, 1], settings) == [[0, 1], [2, 3], [4]]
    assert list(map(len, batches_of(answers(0, [1, 2, 3, 4, 5]), max_batch_items=2))) == [2, 2, 1]


def test_workers_come_to_the_end_together():
    rows = [row for prompt in range(4) for row in answers(prompt, [20] * 13)]
    # 300 tokens a prompt: two of them each, though three would fit into one batch.
    batches = batches_of(rows, 2, max_batch_tokens=1000, batch_overhead_tokens=8)
    assert [num_computed(batch) for batch in batches] == [600, 600]
    # One prompt: computed twice, so that both have something to do.
    batches = batches_of(answers(0, [20] * 40), 2, max_batch_tokens=1000, batch_overhead_tokens=8)
    assert [num_computed(batch) for batch in batches] == [500, 380]


def test_the_largest_of_several_batches_goes_first():
    settings = BatchingSettings(max_batch_tokens=600, batch_overhead_tokens=0)
    assert ByLength().plan("abc", [300, 600, 600], settings, 2) == [[1], [2], [0]]


def test_items_with_the_same_prompt_are_neighbours_whoever_sent_them():
    rows = [row for pair in zip(answers(0, [5] * 4), answers(1, [5] * 4), strict=True) for row in pair]
    plan = BY_PREFIX.plan(rows, [len(row) for row in rows], BatchingSettings())
    assert plan == [[0, 2, 4, 6, 1, 3, 5, 7]]


def test_a_shared_prompt_counts_once_against_the_budget():
    (batch,) = batches_of(answers(0, [10] * 6), max_batch_tokens=100)
    assert count(batch) == Tally(num_shared_tokens=5 * 40)


def test_a_batch_rather_ends_between_prompts_than_within_the_answers_to_one():
    rows = answers(0, [10] * 4) + answers(1, [10] * 4)
    # 80 tokens each: two of the second prompt's answers would fit, and its prompt would be computed twice.
    batches = batches_of(rows, max_batch_tokens=145, batch_overhead_tokens=8)
    assert [len(batch) for batch in batches] == [4, 4]


def test_answers_that_need_more_than_one_batch_are_cut_where_it_is_full():
    batches = batches_of(answers(0, [10] * 20), max_batch_tokens=100, batch_overhead_tokens=8)
    assert [len(batch) for batch in batches] == [6, 6, 6, 2]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60)), min_size=1, max_size=30),
    st.integers(1, 200),
    st.integers(0, 200),
    st.integers(1, 3),
)
def test_batches_are_within_the_budget_and_count_what_a_pack_computes(items, budget, overhead, num_workers):
    rows = [
        np.concatenate([PROMPTS[prompt], np.full(length, 1000 + index % 3, np.int32)])
        for index, (prompt, length) in enumerate(items)
    ]
    for batch in batches_of(rows, num_workers, max_batch_tokens=budget, batch_overhead_tokens=overhead):
        assert num_computed(batch) == len(pack_rows(batch).token_ids)
        assert num_computed(batch) <= budget or len(batch) == 1
