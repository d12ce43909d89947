"""The entropies against which deltas are measured, on weights where they are known."""

import numpy as np
import pytest
from benchmarks.delta_data import Pair, entropy_of


def test_a_quarter_changed_up_or_down_alike() -> None:
    base = np.full(1000, 0x3F81, np.uint16)
    new = base.copy()
    new[::8] += np.uint16(1)
    new[1::8] -= np.uint16(1)
    entropy = entropy_of(
        [Pair(name="a", base=base[:500], new=new[:500]), Pair(name="b", base=base[500:], new=new[500:])]
    )
    assert (entropy.num_elements, entropy.num_changes) == (1000, 250)
    # h(1/4) = 0.8113 bits for each element, and one bit for each change.
    assert entropy.flat_bytes == pytest.approx((811.3 + 250) / 8, rel=1e-3)
    assert entropy.context_bytes == pytest.approx(entropy.flat_bytes)


def test_contexts_that_explain_everything_leave_nothing() -> None:
    base = np.repeat(np.array([0x3F80, 0x3C00], np.uint16), 100)
    new = base.copy()
    new[100:] += np.uint16(1)
    entropy = entropy_of([Pair(name="a", base=base, new=new)])
    assert entropy.flat_bytes == pytest.approx(200 / 8)
    assert entropy.context_bytes == 0
