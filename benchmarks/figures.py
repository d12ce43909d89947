"""A figure: one number that a benchmark measures, and the target that it must meet."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a figure measures and where it has to be: at least, or at most, a bound; no bound, no verdict."""

    what: str
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if self.at_least is not None and self.at_most is not None:
            raise ValueError("a target has one bound: at_least or at_most")

    def met(self, value: float) -> bool | None:
        """Whether `value` meets the bound; None if there is none. NaN meets nothing."""
        if self.at_least is not None:
            return value >= self.at_least
        if self.at_most is not None:
            return value <= self.at_most
        return None

    def __str__(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        if self.at_most is not None:
            return f"≤ {self.at_most:g}"
        return "-"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Median, first and third quartile of `values` (of one value: itself). ValueError if there are none."""
    if not values:
        raise ValueError("no measurements: there must be at least 1")
    if len(values) == 1:
        return Spread(median=values[0], low=values[0], high=values[0], count=1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median=median, low=low, high=high, count=len(values))


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Spread of the ratios of measurements that were taken pairwise, one right after the other.

    A slow minute of the machine hits both halves of a pair, and so leaves their ratio alone.
    ValueError unless there are as many of the one as of the other.
    """
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} numerators and {len(denominators)} denominators: they must pair up")
    return spread([above / below for above, below in zip(numerators, denominators, strict=True)])
