"""Masked statistics, and the accumulator that turns sums from many micro-batches into one mean."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of ``x`` where ``mask`` is true; a NaN or infinity outside the mask does not leak in. Scalar."""
    return torch.where(mask, x, torch.zeros_like(x)).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` where ``mask`` is true; zero if it is true nowhere. Scalar."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, *, unbiased: bool = False) -> Tensor:
    """Variance of ``x`` where ``mask`` is true, population variance unless ``unbiased``. Scalar.

    Two passes (the mean first), because the one-pass form loses all digits when the mean is large.
    """
    centred = x - masked_mean(x, mask)
    freedom = mask.sum() - (1 if unbiased else 0)
    return masked_sum(centred.square(), mask) / freedom.clamp(min=1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """``1 - Var[returns - values] / Var[returns]`` over counted tokens: 1 is a perfect critic, 0 a constant one.

    Shapes ``[...]`` alike. NaN when the returns do not vary, since nothing is there to explain. Scalar.
    """
    total = masked_var(returns, mask)
    residual = masked_var(returns - values, mask)
    return torch.where(total > 0, 1.0 - residual / total, torch.full_like(total, torch.nan))


def wilson_interval(successes: float, trials: float, *, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a proportion, 95 % by default; stays within [0, 1] and is honest for few trials.

    Source: E. B. Wilson, 1927. Without trials it is (0, 1). ValueError unless ``0 <= successes <= trials``.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes is {successes}, must be in [0, trials = {trials}]")
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


@dataclass(kw_only=True)
class MetricSums:
    """Adds sums from micro-batches and divides once, so that a mean is over tokens and not over batches.

    >>> sums = MetricSums()
    >>> sums.add({"clipfrac": torch.tensor(3.0)}, count=torch.tensor(10))
    >>> sums.add({"clipfrac": torch.tensor(1.0)}, count=torch.tensor(30))
    >>> sums.means()
    {'clipfrac': 0.1}

    Values stay tensors on their device until :meth:`means` reads them, so adding never waits for a GPU.
    """

    totals: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, sums: Mapping[str, Tensor], *, count: Tensor | float) -> None:
        """Adds ``sums`` (scalars, each a sum over ``count`` items)."""
        for name, value in sums.items():
            value = value.detach().double()
            number = torch.as_tensor(count, dtype=torch.float64, device=value.device)
            self.totals[name] = self.totals[name] + value if name in self.totals else value
            self.counts[name] = self.counts[name] + number if name in self.counts else number

    def merge(self, other: "MetricSums") -> None:
        """Adds everything that ``other`` holds."""
        for name, total in other.totals.items():
            self.add({name: total}, count=other.counts[name])

    def means(self) -> dict[str, float]:
        """Mean of every metric over all items added; NaN for a metric whose count is zero."""
        return {
            name: float(total) / float(self.counts[name]) if float(self.counts[name]) else float("nan")
            for name, total in self.totals.items()
        }
