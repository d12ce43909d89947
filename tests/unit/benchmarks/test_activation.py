"""What the activation benchmark accepts as undisturbed, without an engine."""

from collections.abc import Sequence

import numpy as np
import pytest
from benchmarks.activation import Timeline

from steersman.client.types import FinishReason, SampleDelta
from steersman.wire.identity import VersionSpan, WeightVersion


def timeline(
    spans: Sequence[tuple[int, int, int]], times: Sequence[float], reason: FinishReason = FinishReason.LENGTH
) -> Timeline:
    """One message for each (step, start, end)."""
    found = Timeline()
    for number, ((step, start, end), now) in enumerate(zip(spans, times, strict=True), start=1):
        version = WeightVersion(run_id="bench", step=step)
        found.add(
            SampleDelta(
                index=0,
                token_ids=np.zeros(end - start, np.int32),
                logprobs=np.zeros(end - start, np.float32),
                weight_versions=(VersionSpan(version=version, start=start, end=end),),
                finish_reason=reason if number == len(spans) else None,
            ),
            now,
        )
    return found


def test_a_step_is_the_time_of_a_message_over_its_tokens() -> None:
    found = timeline([(0, 0, 1), (0, 1, 3), (1, 3, 4)], [0.0, 1.0, 4.0])
    assert found.seconds_per_token() == [0.5, 0.5, 3.0]
    found.check([0, 1], 4)


@pytest.mark.parametrize(
    ("spans", "steps", "fault"),
    [
        ([(0, 0, 2), (1, 3, 4)], [0, 1], "does not begin at token 2"),
        ([(0, 0, 2), (1, 2, 3)], [0, 1], "expected 4"),
        ([(0, 0, 2), (2, 2, 4)], [0, 1, 2], r"versions \[0, 2\]"),
        ([(1, 0, 2), (0, 2, 4)], [0, 1], r"versions \[1, 0\]"),
    ],
)
def test_a_disturbed_request_is_no_measurement(spans: list[tuple[int, int, int]], steps: list[int], fault: str) -> None:
    with pytest.raises(RuntimeError, match=fault):
        timeline(spans, [0.0, 1.0]).check(steps, 4)


def test_an_aborted_request_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="ended by abort"):
        timeline([(0, 0, 4)], [0.0], FinishReason.ABORTED).check([0], 4)
