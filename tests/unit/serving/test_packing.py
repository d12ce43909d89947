"""What rows have in common, and packs of rows, against slow and plain ways to say the same."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from steersman.serving.packing import Pack, Segment, pack_rows, pad_pack, round_up
from steersman.serving.prefixes import MIN_SHARED_TOKENS, num_shared, sort_key

# Rows made of few different pieces, so that they share beginnings of all lengths.
PIECES = st.lists(st.sampled_from([range(7), range(3, 23), range(100, 140), [5]]), min_size=1, max_size=5)
ROWS = st.lists(PIECES.map(lambda pieces: row(*pieces)), min_size=1, max_size=12)


def row(*pieces) -> np.ndarray:
    return np.array([token for piece in pieces for token in piece], np.int32)


def unpack(pack: Pack, index: int) -> tuple[list[int], list[int]]:
    """Token ids and positions of a row: those of the segment that its last token is in, and of what is before it."""
    last = int(pack.last[index])
    (segment,) = [segment for segment in pack.segments if segment.start <= last < segment.stop]
    where = [at for start, stop in segment.before for at in range(start, stop)]
    where += range(segment.start, last + 1)
    return pack.token_ids[where].tolist(), pack.positions[where].tolist()


@given(ROWS)
def test_every_row_can_be_read_from_the_pack(rows):
    pack = pack_rows(rows)
    for index, expected in enumerate(rows):
        tokens, positions = unpack(pack, index)
        assert tokens == expected.tolist()
        assert positions == list(range(len(expected)))


@given(ROWS)
def test_the_tokens_of_every_row_are_where_its_spans_say(rows):
    pack = pack_rows(rows)
    for spans, expected in zip(pack.row_spans(), rows, strict=True):
        where = [at for start, stop in spans for at in range(start, stop)]
        assert pack.token_ids[where].tolist() == expected.tolist()


@given(ROWS)
def test_segments_lie_one_behind_the_other(rows):
    pack = pack_rows(rows)
    assert [segment.start for segment in pack.segments] == [0, *(segment.stop for segment in pack.segments[:-1])]
    assert pack.segments[-1].stop == len(pack.token_ids)
    for segment in pack.segments:
        assert all(start < stop <= segment.start for start, stop in segment.before)


@given(ROWS)
def test_nothing_that_is_long_enough_is_computed_twice(rows):
    distinct = {tuple(each[: length + 1]) for each in rows for length in range(len(each))}
    # A beginning may be there twice only where rows part within their first tokens.
    assert len(distinct) <= len(pack_rows(rows).token_ids) <= len(distinct) + len(rows) * (MIN_SHARED_TOKENS - 1)


@given(st.integers(1, 1 << 20), st.sampled_from([0, 1, 2, 8, 64, 256]))
def test_sizes_are_rounded_up_by_an_eighth_at_most(number, max_step):
    rounded = round_up(number, max_step)
    assert number <= rounded < number + max(1, max_step)
    assert rounded <= number * 9 / 8
    assert round_up(rounded, max_step) == rounded


def test_few_sizes_occur():
    assert len({round_up(number, 64) for number in range(1, 4097)}) < 120


@given(ROWS, st.integers(0, 9))
def test_padding_is_of_no_row_and_after_all_of_them(rows, more):
    pack = pack_rows(rows)
    size = len(pack.token_ids)
    padded = pad_pack(pack, size + more)
    assert len(padded.token_ids) == len(padded.positions) == padded.segments[-1].stop == size + more
    assert padded.positions[size:].tolist() == [0] * more
    assert [unpack(padded, index) for index in range(len(rows))] == [unpack(pack, index) for index in range(len(rows))]


def test_a_conversation_and_its_answers():
    prompt, turn = range(100, 120), range(200, 210)
    rows = [row(prompt, [1, 2]), row(prompt, [1, 3]), row(prompt), row(prompt, turn), row(prompt, turn, [9]), row([7])]
    pack = pack_rows(rows)
    assert pack.segments == (
        Segment(start=0, stop=1),
        Segment(start=1, stop=23),
        Segment(start=23, stop=24, before=((1, 22),)),
        Segment(start=24, stop=35, before=((1, 21),)),
    )
    assert pack.last.tolist() == [22, 23, 20, 33, 34, 0]


def test_the_same_row_twice_is_computed_once():
    again = row(range(50))
    pack = pack_rows([again, again])
    assert len(pack.token_ids) == 50
    assert pack.last.tolist() == [49, 49]


def test_short_common_beginnings_are_not_worth_sharing():
    long, short = range(MIN_SHARED_TOKENS), range(MIN_SHARED_TOKENS - 1)
    assert num_shared(row(long, [90]), row(long, [91])) == MIN_SHARED_TOKENS
    assert num_shared(row(short, [90]), row(short, [91])) == 0
    assert num_shared(row(long), row(long)) == MIN_SHARED_TOKENS
    assert num_shared(row([]), row(long)) == 0


@given(ROWS)
def test_keys_sort_as_token_ids_do(rows):
    by_key = [each.tolist() for each in sorted(rows, key=sort_key)]
    assert by_key == sorted(each.tolist() for each in rows)
