"""What rows of token ids have in common at their beginnings.

A causal model computes the same for the same beginning, so that two responses need their prompt computed only once.
Sorted by their tokens, rows with a common beginning are neighbours, and what a row shares with any row before it, it
shares with the one right before it.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MIN_SHARED_TOKENS: Final = 16
"""Shorter common beginnings (a BOS, the first words of a template) are computed again: reading them from another row
costs more than that."""


def sort_key(row: NDArray[np.int32]) -> bytes:
    """Bytes that sort as the token ids do, which are not negative."""
    return row.astype(">u4").tobytes()


def num_shared(row: NDArray[Any], other: NDArray[Any]) -> int:
    """Tokens of the common beginning of two rows; 0 where it is too short to be worth sharing."""
    length = min(len(row), len(other))
    differs = row[:length] != other[:length]
    first = int(differs.argmax()) if length else 0
    shared = first if length and differs[first] else length
    return shared if shared >= MIN_SHARED_TOKENS else 0
