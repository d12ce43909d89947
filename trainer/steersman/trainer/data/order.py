"""Which records make a batch, in what order, and which are held out."""

import math
import random
from collections.abc import Sequence


class EpochOrder:
    """Batches of record numbers over shuffled epochs: a pure function of the seed and the step, so a resume needs the
    step alone.

    Each epoch holds every record once; the last batch of an epoch may be smaller.
    """

    def __init__(self, num_records: int, *, batch_size: int, seed: int) -> None:
        """ValueError unless both numbers are at least 1."""
        for name, value in (("num_records", num_records), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        self._num_records = num_records
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return math.ceil(self._num_records / self._batch_size)

    def batch(self, step: int) -> list[int]:
        """The record numbers of batch ``step``, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._permutation = list(range(self._num_records))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._permutation)
            self._epoch = epoch
        start = position * self._batch_size
        return self._permutation[start : start + self._batch_size]


def balanced(signs: Sequence[int], *, seed: int) -> list[int]:
    """Record numbers in which as many have a positive sign as a negative one: those of the rarer sign come again, the
    further times in an order drawn by the seed. A record of sign 0 comes once. Nothing to balance: every record once.
    """
    sides = [[n for n, sign in enumerate(signs) if sign * side > 0] for side in (1, -1)]
    rarer, other = sorted(sides, key=len)
    numbers = list(range(len(signs)))
    if not rarer:
        return numbers
    again = list(rarer)
    random.Random(f"{seed}/balance").shuffle(again)
    return numbers + [again[n % len(again)] for n in range(len(other) - len(rarer))]


def split_indices(num_records: int, *, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Record numbers to train on and ``held_out`` others to evaluate on, drawn by the seed, each in ascending order."""
    if not 0 <= held_out < num_records:
        raise ValueError(f"held_out is {held_out}, must be at least 0 and below the number of records, {num_records}")
    numbers = list(range(num_records))
    random.Random(f"{seed}/held-out").shuffle(numbers)
    return sorted(numbers[held_out:]), sorted(numbers[:held_out])
