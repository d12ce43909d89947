"""Rates with their intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# Of the standard normal, for 95 % on both sides.
Z: Final = 1.959964


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with a 95 % interval, rounded for people."""

    value: float
    low: float
    high: float
    num: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def win_rate(after: Sequence[float], before: Sequence[float]) -> Estimate:
    """Share of places where `after` is higher, ties counting half, with Wilson's interval (Wilson 1927)."""
    num = len(after)
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(after, before, strict=True))
    share = wins / num
    centre = (share + Z**2 / (2 * num)) / (1 + Z**2 / num)
    half = Z / (1 + Z**2 / num) * math.sqrt(share * (1 - share) / num + Z**2 / (4 * num**2))
    return Estimate(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half), num=num)


def mean(values: Sequence[float]) -> Estimate:
    """Mean with the interval of the normal approximation."""
    num = len(values)
    average = math.fsum(values) / num
    variance = math.fsum((value - average) ** 2 for value in values) / max(1, num - 1)
    half = Z * math.sqrt(variance / num)
    return Estimate(value=average, low=average - half, high=average + half, num=num)
