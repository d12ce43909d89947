"""Metrics of a batch that is shared out over ranks."""

import torch

from steersman.trainer.algorithm.metrics import MetricSums
from steersman.trainer.distributed.world import World


def total(world: World, sums: MetricSums) -> MetricSums:
    """`sums` of all ranks added up, the same on each. A collective: every rank has the same names."""
    if world.size == 1 or not sums.totals:
        return sums
    names = sorted(sums.totals)
    numbers = torch.stack([*(sums.totals[name] for name in names), *(sums.counts[name] for name in names)])
    world.sum(numbers)
    values, counts = numbers.chunk(2)
    return MetricSums(totals=dict(zip(names, values, strict=True)), counts=dict(zip(names, counts, strict=True)))
