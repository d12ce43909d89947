"""Which batches of rollouts are under way.

Step k trains on batch k; weights k are those before its update, k + 1 those after it. With `max_staleness` N batch k
may hold tokens of weights k - N and later, so it is begun the moment weights k - N are published:

    N = 0:  [draw k][update k][push k+1][draw k+1][update k+1]...

    N = 1:  [draw k][update k   ][update k+1           ][update k+2           ]...
                                 [push k+1]             [push k+2]
              [draw k+1 ........]          [draw k+2 ..]          [draw k+3 ..]

A push switches running requests without aborting them: a response begun by weights k may end under weights k + 2, and
each token carries the step of the weights that drew it and its log-prob under exactly these.

Invariants:

- Each batch is begun once and taken once, both in order. It is never begun before weights k - N are published.
- At most N + 1 batches are begun and not taken: so many may be under way or wait to be trained, and no more.
- Every token of a batch taken for step k was drawn by weights k - N or later of this attempt. The collector is asked
  for no less, whatever happens to replicas meanwhile, and what it gives is looked at once more.
- Leaving the context cancels all that is under way.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from steersman.trainer.rollout.types import RolloutBatch


class RolloutPipeline:
    """The batches between the first prompt sent and the update. Use as a context manager, from one thread.

    Args:
        begin: starts a batch, given its step and the oldest step whose weights may draw a token of it.
        first_step: the first batch to train on, counted from 0; total_steps: one after the last.
        max_staleness: N above; at least 0.
    """

    def __init__(
        self,
        begin: "Callable[[int, int], Future[RolloutBatch]]",
        *,
        first_step: int,
        total_steps: int,
        max_staleness: int,
    ) -> None:
        self._begin = begin
        self._total_steps = total_steps
        self._max_staleness = max_staleness
        self._next_begun = first_step
        self._next_taken = first_step
        self._under_way: deque[Future[RolloutBatch]] = deque()

    @property
    def num_ready(self) -> int:
        """Batches that are complete and not taken: how far generation is ahead of training."""
        return sum(future.done() for future in self._under_way)

    def published(self, step: int) -> None:
        """Weights of `step` are at the replicas, or on their way there: begins every batch that they may draw. `begin`
        sees to it that nothing is drawn before they have arrived.
        """
        while self._next_begun < min(step + self._max_staleness + 1, self._total_steps):
            self._under_way.append(self._begin(self._next_begun, self.oldest_step(self._next_begun)))
            self._next_begun += 1

    def take(self) -> "Future[RolloutBatch]":
        """The next batch, begun before and maybe complete. From now on it is the caller's, to wait for or to cancel."""
        assert self._under_way, f"batch {self._next_taken} was not begun: its weights are not published"
        self._next_taken += 1
        return self._under_way.popleft()

    def oldest_step(self, step: int) -> int:
        """The oldest step whose weights may draw a token that is trained on at `step`."""
        return max(step - self._max_staleness, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._under_way:
            self._under_way.pop().cancel()


def require_fresh(batch: RolloutBatch, *, run_id: str, oldest_step: int, step: int) -> None:
    """RuntimeError if weights of another attempt, or outside [oldest_step, step], drew a token of `batch`."""
    for rollout in batch.rollouts:
        for version in (span.version for span in rollout.weight_versions):
            if version.run_id != run_id or not oldest_step <= version.step <= step:
                raise RuntimeError(
                    f"sample {rollout.key[0]}.{rollout.key[1]} of step {step} holds tokens of weights {version}, "
                    f"must be of {run_id} and in [{oldest_step}, {step}] (max_staleness)"
                )
