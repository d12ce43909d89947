"""Which weights produced which tokens, while a request still runs.

vLLM reports version spans with the last output of a request only. Its output processor keeps them all
along, as (version, first token) pairs that are written before a token is handed out, so a delta that was
received is always
covered by them: reading them there is exact, however many deltas were merged on the way.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from steersman.wire.identity import VersionSpan, WeightVersion


class FinalSpan(Protocol):
    """vLLM's `WeightVersionSpan`."""

    version: str
    start: int
    end: int


class VersionTracker:
    """The spans of one request with a single sample."""

    def __init__(self, output_processor: Any, request_id: str) -> None:
        self.request_id = request_id
        self._processor = output_processor
        self._state: Any = None
        self._num_seen = 0

    def advance(self, num_tokens: int, final: Sequence[FinalSpan] | None) -> tuple[VersionSpan, ...]:
        """Spans of the next `num_tokens` tokens. `final` are vLLM's own spans, on the last output."""
        start, end = self._num_seen, self._num_seen + num_tokens
        self._num_seen = end
        starts = [(span.version, span.start) for span in final] if final is not None else self._starts()
        return spans_between(starts, start, end)

    def _starts(self) -> Sequence[tuple[str, int]]:
        if self._state is None:
            # vLLM adds a random suffix to the id of a request.
            (internal_id,) = self._processor.external_req_ids[self.request_id]
            self._state = self._processor.request_states[internal_id]
        starts: Sequence[tuple[str, int]] = self._state.weight_version_starts
        return starts


def spans_between(starts: Sequence[tuple[str, int]], start: int, end: int) -> tuple[VersionSpan, ...]:
    """Cuts [start, end) at the version changes of `starts`, (version, first token) in ascending order.

    >>> [(s.version.step, s.start, s.end) for s in spans_between([("r@1", 0), ("r@2", 5)], 3, 8)]
    [(1, 3, 5), (2, 5, 8)]
    """
    ends = [first for _, first in starts[1:]] + [end]
    spans = []
    for (version, first), last in zip(starts, ends, strict=False):
        low, high = max(first, start), min(last, end)
        if low < high:
            spans.append(VersionSpan(version=WeightVersion.parse(version), start=low, end=high))
    return tuple(spans)
