"""Version spans of deltas."""

from itertools import pairwise
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from steersman.policy.engine.spans import VersionTracker, spans_between
from steersman.wire.identity import VersionSpan


def expand(spans: tuple[VersionSpan, ...]) -> dict[int, int]:
    return {token: span.version.step for span in spans for token in range(span.start, span.end)}


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.lists(st.integers(0, 7), max_size=6))
def test_deltas_cut_anywhere_give_every_token_its_version(runs: list[int], cuts: list[int]) -> None:
    versions = [step for step, length in enumerate(runs) for _ in range(length)]
    starts = [(f"r@{step}", sum(runs[:step])) for step in range(len(runs))]
    bounds = sorted({0, len(versions), *(cut for cut in cuts if cut < len(versions))})
    stamped = {}
    for start, end in pairwise(bounds):
        spans = spans_between(starts, start, end)
        assert [span.start for span in spans] == [start, *(span.end for span in spans[:-1])]
        stamped |= expand(spans)
    assert stamped == dict(enumerate(versions))


def test_tracker_reads_running_requests_and_prefers_final_spans() -> None:
    state = SimpleNamespace(weight_version_starts=[("initial", 0)])
    processor = SimpleNamespace(external_req_ids={"q/0": ["q/0-abc"]}, request_states={"q/0-abc": state})
    tracker = VersionTracker(processor, "q/0")
    assert expand(tracker.advance(3, None)) == {0: 0, 1: 0, 2: 0}
    state.weight_version_starts.append(("r@5", 4))
    assert expand(tracker.advance(2, None)) == {3: 0, 4: 5}
    # vLLM forgets a request when it ends; its last output has the spans.
    processor.request_states.clear()
    processor.external_req_ids.clear()
    final = [SimpleNamespace(version="initial", start=0, end=4), SimpleNamespace(version="r@5", start=4, end=6)]
    assert expand(tracker.advance(1, final)) == {5: 5}


def test_no_tokens_no_spans() -> None:
    assert spans_between([("initial", 0)], 0, 0) == ()
    assert spans_between([], 0, 0) == ()
