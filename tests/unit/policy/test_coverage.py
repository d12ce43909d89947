"""Which elements have arrived, against a set of integers."""

from hypothesis import given
from hypothesis import strategies as st

from steersman.policy.weights.coverage import Coverage

SIZE = 24
spans = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)


@given(st.lists(spans, max_size=30))
def test_behaves_like_a_set(adds: list[list[int]]) -> None:
    coverage, reference = Coverage(SIZE), set[int]()
    for start, end in adds:
        new = set(range(start, end))
        assert coverage.add(start, end) is reference.isdisjoint(new)
        if reference.isdisjoint(new):
            reference |= new
        gap = min(set(range(SIZE)) - reference, default=None)
        assert coverage.first_gap() == gap


def test_touching_spans_merge() -> None:
    coverage = Coverage(1000)
    for start in [*range(0, 1000, 20), *range(10, 1000, 20)]:
        assert coverage.add(start, start + 10)
    assert coverage.first_gap() is None
    assert len(coverage._starts) == 1


def test_an_empty_tensor_is_complete() -> None:
    assert Coverage(0).first_gap() is None


@given(st.sets(st.integers(0, 19)), st.integers(0, 20), st.integers(0, 20))
def test_what_is_discarded_may_come_again(arrived: set[int], start: int, end: int) -> None:
    coverage = Coverage(20)
    for element in arrived | set(range(start, end)):
        assert coverage.add(element, element + 1)
    coverage.discard(start, end)
    for element in range(20):
        expected = (element in arrived) and not start <= element < end
        assert coverage.overlaps(element, element + 1) is expected
    assert coverage.add(start, end)
