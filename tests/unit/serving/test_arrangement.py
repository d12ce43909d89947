"""Where batches are cut, with the cost of a batch counted by hand."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from steersman.serving.arrangement import ByLength, ByPrefix, Cut
from steersman.serving.batch_settings import BatchingSettings
from steersman.serving.packing import pack_rows

PROMPTS = [np.arange(100 * index, 100 * index + 40, dtype=np.int32) for index in range(4)]
BY_PREFIX = ByPrefix[np.ndarray](lambda row: row)


def answers(prompt: int, lengths: list[int]) -> list[np.ndarray]:
    return [
        np.concatenate([PROMPTS[prompt], np.full(length, 1000 + index, np.int32)])
        for index, length in enumerate(lengths)
    ]


def run_in_order(rows: list[np.ndarray], **settings) -> list[tuple[list[np.ndarray], Cut]]:
    """All batches of a wave."""
    left = [rows[index] for index in BY_PREFIX.order(rows, [len(row) for row in rows])]
    batches = []
    while left:
        cut = BY_PREFIX.cut(left, [len(row) for row in left], BatchingSettings(**settings))
        batches.append((left[: cut.num_items], cut))
        left = left[cut.num_items :]
    return batches


def test_by_length_counts_padding():
    settings = BatchingSettings(max_batch_tokens=100, batch_overhead_tokens=1000)
    assert ByLength().order("abc", [1, 3, 2]) == [1, 2, 0]
    assert ByLength().cut("abcd", [40, 30, 10, 5], settings) == Cut(num_items=2, num_padding_tokens=10)
    assert ByLength().cut("a", [500], settings) == Cut(num_items=1)


def test_items_with_the_same_prompt_are_neighbours_whoever_sent_them():
    rows = [row for pair in zip(answers(0, [5] * 4), answers(1, [5] * 4), strict=True) for row in pair]
    order = BY_PREFIX.order(rows, [len(row) for row in rows])
    assert order == [0, 2, 4, 6, 1, 3, 5, 7]


def test_a_shared_prompt_counts_once_against_the_budget():
    ((batch, cut),) = run_in_order(answers(0, [10] * 6), max_batch_tokens=100)
    assert len(batch) == 6
    assert cut.num_shared_tokens == 5 * 40
    assert cut.num_padding_tokens == 0


def test_a_batch_rather_ends_between_prompts_than_within_the_answers_to_one():
    rows = answers(0, [10] * 4) + answers(1, [10] * 4)
    # 80 tokens each: two of the second prompt's answers would fit, and its prompt would be computed twice.
    batches = run_in_order(rows, max_batch_tokens=145, batch_overhead_tokens=8)
    assert [len(batch) for batch, _ in batches] == [4, 4]


def test_answers_that_need_more_than_one_batch_are_cut_where_it_is_full():
    batches = run_in_order(answers(0, [10] * 20), max_batch_tokens=100, batch_overhead_tokens=8)
    assert [len(batch) for batch, _ in batches] == [6, 6, 6, 2]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60)), min_size=1, max_size=30),
    st.integers(1, 200),
    st.integers(0, 200),
)
def test_cuts_are_within_the_budget_and_count_what_a_pack_computes(items, budget, overhead):
    rows = [
        np.concatenate([PROMPTS[prompt], np.full(length, 1000 + index % 3, np.int32)])
        for index, (prompt, length) in enumerate(items)
    ]
    batches = run_in_order(rows, max_batch_tokens=budget, batch_overhead_tokens=overhead)
    assert sum(len(batch) for batch, _ in batches) == len(rows)
    for batch, cut in batches:
        computed = sum(len(row) for row in batch) - cut.num_shared_tokens
        assert computed == len(pack_rows(batch).token_ids)
        assert computed <= budget or len(batch) == 1
