"""What batchers tell of their queues and batches, and the Prometheus instruments that hear it."""

from dataclasses import dataclass
from typing import Protocol

from steersman.serving.metrics import COUNT_BUCKETS, TOKEN_BUCKETS, Metrics


@dataclass(frozen=True, kw_only=True)
class BatchRecord:
    """What one batch was like. Times are in seconds; `queue_s` is how long its oldest item waited.

    `num_tokens` are those of its items. It computed `num_padding_tokens` more, and `num_shared_tokens` fewer, which
    several items have in common.
    """

    num_items: int
    num_tokens: int
    num_padding_tokens: int
    num_shared_tokens: int
    queue_s: float
    run_s: float
    num_failed: int


class BatchObserver(Protocol):
    """Told of every change; called on the event loop and on the worker thread, so it must be thread-safe."""

    def queue_changed(self, num_items: int) -> None:
        """`num_items` are waiting now."""
        ...

    def batch_done(self, record: BatchRecord) -> None:
        """A batch was run."""
        ...


class BatchMetrics:
    """The instruments of all batchers of a server; `observer` gives one batcher its own label."""

    def __init__(self, metrics: Metrics) -> None:
        labels = ("batcher",)
        self._depth = metrics.gauge("queue_depth", "Items that wait to be run.", labels)
        self._items = metrics.histogram("batch_items", "Items of a batch.", labels, COUNT_BUCKETS)
        self._tokens = metrics.histogram("batch_tokens", "Tokens of a batch, padding left out.", labels, TOKEN_BUCKETS)
        self._tokens_total = metrics.counter("batched_tokens", "Tokens of the items run, padding left out.", labels)
        self._padding_total = metrics.counter("padding_tokens", "Padding run: the waste of batching.", labels)
        self._shared_total = metrics.counter(
            "shared_tokens", "Tokens not run, because an item of the same batch begins with the same.", labels
        )
        self._failed_total = metrics.counter("batched_items_failed", "Items that failed when run.", labels)
        self._queue_seconds = metrics.histogram(
            "batch_queue_seconds", "Longest wait of an item of a batch, in seconds.", labels
        )
        self._run_seconds = metrics.histogram("batch_run_seconds", "Time to run a batch, in seconds.", labels)

    def observer(self, batcher: str) -> BatchObserver:
        """What to give to the batcher of that name."""
        return _LabelledObserver(self, batcher)

    def forget(self, batcher: str) -> None:
        """Drops the figures of a batcher that is gone; nothing if it has none."""
        for instrument in (
            self._depth,
            self._items,
            self._tokens,
            self._tokens_total,
            self._padding_total,
            self._shared_total,
            self._failed_total,
            self._queue_seconds,
            self._run_seconds,
        ):
            instrument.remove(batcher)


class _LabelledObserver:
    def __init__(self, metrics: BatchMetrics, batcher: str) -> None:
        self._depth = metrics._depth.labels(batcher)
        self._items = metrics._items.labels(batcher)
        self._tokens = metrics._tokens.labels(batcher)
        self._tokens_total = metrics._tokens_total.labels(batcher)
        self._padding_total = metrics._padding_total.labels(batcher)
        self._shared_total = metrics._shared_total.labels(batcher)
        self._failed_total = metrics._failed_total.labels(batcher)
        self._queue_seconds = metrics._queue_seconds.labels(batcher)
        self._run_seconds = metrics._run_seconds.labels(batcher)

    def queue_changed(self, num_items: int) -> None:
        self._depth.set(num_items)

    def batch_done(self, record: BatchRecord) -> None:
        self._items.observe(record.num_items)
        self._tokens.observe(record.num_tokens)
        self._tokens_total.inc(record.num_tokens)
        self._padding_total.inc(record.num_padding_tokens)
        self._shared_total.inc(record.num_shared_tokens)
        self._failed_total.inc(record.num_failed)
        self._queue_seconds.observe(record.queue_s)
        self._run_seconds.observe(record.run_s)
