"""Order, bounds, fairness and isolation of the batcher, with a worker that the test holds by the hand."""

import asyncio
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.serving.batch_metrics import BatchMetrics, BatchRecord
from steersman.serving.batch_settings import MIN_BATCH_TOKENS
from steersman.serving.batching import (
    INTERACTIVE_STREAK,
    WAVE_BATCHES,
    Batcher,
    BatchingSettings,
    Priority,
    worth_padding,
)
from steersman.serving.metrics import Metrics
from steersman.wire.errors import Reason, SteersmanError

WAIT_S = 10.0


class GatedWorker:
    """Runs a batch when the test lets it: doubles every item, keeps what it saw, fails on items that are negative."""

    def __init__(self, *, is_open: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self._gate = threading.Semaphore(0)
        self._is_open = is_open

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.entered.release()
        if not self._is_open:
            assert self._gate.acquire(timeout=WAIT_S)
        if any(item < 0 for item in items):
            raise ValueError("negative")
        return [2 * item for item in items]

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=WAIT_S)

    def let_through(self, count: int = 1) -> None:
        for _ in range(count):
            self._gate.release()

    def open(self) -> None:
        self._is_open = True
        self.let_through(100)


class Recorder:
    def __init__(self) -> None:
        self.depths: list[int] = []
        self.records: list[BatchRecord] = []

    def queue_changed(self, num_items: int) -> None:
        self.depths.append(num_items)

    def batch_done(self, record: BatchRecord) -> None:
        self.records.append(record)


def make(worker, observer=None, num_workers=1, **settings) -> Batcher[int, int]:
    defaults = {"max_batch_tokens": 100, "max_delay_ms": 0, "batch_overhead_tokens": 1000}
    chosen = BatchingSettings(**(defaults | settings))
    return Batcher(worker, chosen, name="test", observer=observer, num_workers=num_workers)


async def hold_busy(batcher: Batcher[int, int], worker: GatedWorker, num_tokens: int = 1) -> asyncio.Future[int]:
    """Keeps the worker in a batch of one, so that all that comes next has to queue."""
    (future,) = batcher.submit([0], [num_tokens])
    await worker.wait_entered()
    return future


def test_the_token_budget_follows_the_device_unless_it_is_set():
    assert BatchingSettings().for_device("cpu").batch_tokens == 4096
    assert BatchingSettings().for_device("cuda").batch_tokens == 16384
    assert BatchingSettings(max_batch_tokens=7).for_device("cuda").batch_tokens == 7
    assert BatchingSettings().for_device("cpu", 2).batch_tokens == 2048
    assert BatchingSettings().for_device("cpu", 64).batch_tokens == MIN_BATCH_TOKENS
    assert BatchingSettings(max_batch_tokens=7).for_device("cpu", 2).batch_tokens == 7


def test_a_time_limit_lowers_the_token_budget_of_slow_models():
    settings = BatchingSettings(max_batch_tokens=4096, max_batch_ms=500)
    assert settings.at_speed(None).batch_tokens == 4096
    assert settings.at_speed(100_000).batch_tokens == 4096
    assert settings.at_speed(2000).batch_tokens == 1000
    assert settings.at_speed(1).batch_tokens == MIN_BATCH_TOKENS
    assert BatchingSettings(max_batch_tokens=4096).at_speed(1).batch_tokens == 4096


async def test_batches_shrink_to_the_time_limit_once_the_speed_is_known():
    worker = GatedWorker(is_open=True)
    # No machine does a batch of the test in a nanosecond.
    batcher = make(worker, max_batch_tokens=1000, max_batch_ms=1e-6)
    await batcher.run([0], [1])
    await batcher.run(list(range(1, 11)), [100] * 10)
    assert max(len(batch) for batch in worker.batches) == MIN_BATCH_TOKENS // 100
    await batcher.close()


async def test_results_come_in_the_order_of_the_request():
    batcher = make(GatedWorker(is_open=True))
    assert await batcher.run([1, 2, 3], [5, 50, 20]) == [2, 4, 6]
    await batcher.close()


async def test_batches_are_length_sorted_and_within_the_budget():
    worker = GatedWorker()
    batcher = make(worker)
    first = await hold_busy(batcher, worker)
    futures = batcher.submit([10, 40, 20, 30, 50], [10, 40, 20, 30, 50])
    worker.open()
    await asyncio.gather(first, *futures)
    # Longest first; 50 + 40 pad to 100; 30 x 3 = 90.
    assert worker.batches == [[0], [50, 40], [30, 20, 10]]
    await batcher.close()


async def test_an_item_longer_than_the_budget_runs_alone():
    worker = GatedWorker(is_open=True)
    batcher = make(worker)
    assert await batcher.run([1, 2], [500, 400]) == [2, 4]
    assert worker.batches == [[1], [2]]
    await batcher.close()


async def test_items_that_queue_while_the_worker_is_busy_share_a_batch():
    worker = GatedWorker()
    batcher = make(worker)
    first = await hold_busy(batcher, worker)
    futures = [batcher.submit([index], [5])[0] for index in (1, 2, 3)]
    worker.open()
    await asyncio.gather(first, *futures)
    assert sorted(worker.batches[1]) == [1, 2, 3]
    await batcher.close()


async def test_an_idle_worker_waits_for_as_many_callers_as_came_last_time():
    worker = GatedWorker()
    # The delay is far above the test's patience: only the arrival of the second caller can start the batch.
    batcher = make(worker, max_delay_ms=1000)
    first = await hold_busy(batcher, worker)
    pair = [batcher.submit([index], [5])[0] for index in (1, 2)]
    worker.open()
    await asyncio.gather(first, *pair)
    early = batcher.submit([3], [5])
    late = batcher.submit([4], [5])
    await asyncio.gather(*early, *late)
    assert sorted(worker.batches[2]) == [3, 4]
    await batcher.close()


async def test_a_full_queue_refuses_the_whole_call_and_says_when_to_return():
    worker = GatedWorker()
    batcher = make(worker, max_queue_items=3)
    first = await hold_busy(batcher, worker)
    kept = batcher.submit([1, 2], [5, 5])
    with pytest.raises(SteersmanError) as raised:
        batcher.submit([3, 4], [5, 5])
    assert raised.value.reason is Reason.QUEUE_FULL
    assert raised.value.retry_after_seconds is not None
    assert raised.value.retry_after_seconds > 0
    assert batcher.num_waiting == 2
    worker.open()
    assert await asyncio.gather(first, *kept) == [0, 2, 4]
    await batcher.close()


async def test_an_empty_queue_admits_more_than_it_holds():
    batcher = make(GatedWorker(is_open=True), max_queue_items=2)
    assert await batcher.run([1, 2, 3, 4], [5] * 4) == [2, 4, 6, 8]
    await batcher.close()


async def test_cancelled_items_give_their_place_back_and_are_not_run():
    worker = GatedWorker()
    batcher = make(worker, max_queue_items=2)
    first = await hold_busy(batcher, worker)
    for future in batcher.submit([1, 2], [5, 5]):
        future.cancel()
    kept = batcher.submit([3, 4], [5, 5])
    worker.open()
    assert await asyncio.gather(first, *kept) == [0, 6, 8]
    assert worker.batches[1:] == [[3, 4]] or worker.batches[1:] == [[4, 3]]
    await batcher.close()


async def test_a_cancelled_caller_withdraws_its_items():
    worker = GatedWorker()
    batcher = make(worker)
    first = await hold_busy(batcher, worker)
    caller = asyncio.create_task(batcher.run([7, 8], [5, 5]))
    await asyncio.sleep(0)
    assert batcher.num_waiting == 2
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    (last,) = batcher.submit([1], [5])
    worker.open()
    await asyncio.gather(first, last)
    assert worker.batches == [[0], [1]]
    await batcher.close()


async def test_an_item_past_its_deadline_fails_and_is_not_run():
    worker = GatedWorker()
    batcher = make(worker)
    first = await hold_busy(batcher, worker)
    late, patient = batcher.submit([1, 2], [5, 5], timeouts_s=[0.001, None])
    with pytest.raises(SteersmanError) as raised:
        await late
    assert raised.value.reason is Reason.DEADLINE_EXCEEDED
    worker.open()
    assert await asyncio.gather(first, patient) == [0, 4]
    assert worker.batches == [[0], [2]]
    await batcher.close()


async def test_a_bad_item_fails_alone():
    worker = GatedWorker(is_open=True)
    batcher = make(worker, max_batch_tokens=1000)
    futures = batcher.submit([1, 2, -3, 4, 5], [5] * 5)
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert [outcome for outcome in outcomes if not isinstance(outcome, Exception)] == [2, 4, 8, 10]
    assert isinstance(outcomes[2], ValueError)
    batcher.check_health()
    assert await batcher.run([6], [5]) == [12]
    await batcher.close()


async def test_a_short_result_list_is_an_error_not_a_hang():
    batcher: Batcher[int, int] = make(lambda items: [])
    with pytest.raises(RuntimeError, match="0 results for 1 items"):
        await batcher.run([1], [5])
    await batcher.close()


async def test_interactive_items_go_before_bulk_ones():
    worker = GatedWorker()
    batcher = make(worker)
    first = await hold_busy(batcher, worker)
    bulk = batcher.submit([1, 2], [100, 100])
    interactive = batcher.submit([3], [10], priority=Priority.INTERACTIVE)
    worker.open()
    await asyncio.gather(first, *bulk, *interactive)
    assert worker.batches == [[0], [3], [2], [1]] or worker.batches == [[0], [3], [1], [2]]
    await batcher.close()


async def test_interactive_items_overtake_a_wave_of_bulk_that_has_begun():
    worker = GatedWorker()
    batcher = make(worker)
    bulk = batcher.submit([1, 1, 1], [100, 100, 100])
    await worker.wait_entered()
    interactive = batcher.submit([3], [10], priority=Priority.INTERACTIVE)
    worker.open()
    await asyncio.gather(*bulk, *interactive)
    assert worker.batches == [[1], [3], [1], [1]]
    await batcher.close()


async def test_bulk_is_not_starved_by_interactive_items():
    worker = GatedWorker()
    batcher = make(worker)
    first = await hold_busy(batcher, worker)
    bulk = batcher.submit([1], [100])
    interactive = batcher.submit([2] * 10, [100] * 10, priority=Priority.INTERACTIVE)
    worker.open()
    await asyncio.gather(first, *bulk, *interactive)
    assert worker.batches.index([1]) == 1 + INTERACTIVE_STREAK
    await batcher.close()


async def test_items_join_a_wave_that_is_not_full():
    worker = GatedWorker()
    batcher = make(worker)
    wave = batcher.submit([1, 2], [90, 10])
    await worker.wait_entered()
    later = batcher.submit([3, 4], [100, 9])
    worker.open()
    await asyncio.gather(*wave, *later)
    assert worker.batches == [[1], [3], [2, 4]]
    await batcher.close()


async def test_a_wave_that_is_full_is_finished_before_later_items_of_any_length():
    worker = GatedWorker()
    batcher = make(worker)
    num_long = WAVE_BATCHES
    wave = batcher.submit([0, *range(1, num_long + 1)], [10, *[100] * num_long])
    await worker.wait_entered()
    later = batcher.submit([98, 99], [100, 95])
    worker.open()
    await asyncio.gather(*wave, *later)
    # The short item of the first wave is not passed by the longer ones that came after it.
    assert worker.batches == [*([index] for index in range(1, num_long + 1)), [0], [98], [99]]
    await batcher.close()


async def test_workers_run_batches_side_by_side_and_share_a_wave_evenly():
    worker = GatedWorker()
    batcher = make(worker, num_workers=2, max_batch_tokens=1000)
    first = [await hold_busy(batcher, worker) for _ in range(2)]
    futures = batcher.submit(list(range(1, 9)), [300] * 8)
    worker.let_through(2)
    await worker.wait_entered()
    await worker.wait_entered()
    worker.open()
    assert await asyncio.gather(*first, *futures) == [0, 0, *range(2, 17, 2)]
    # A budget of 1,000 would make 3, 3 and 2 of them.
    assert sorted(map(sorted, worker.batches[2:])) == [[1, 2], [3, 4], [5, 6], [7, 8]]
    await batcher.close()


async def test_one_call_keeps_all_workers_busy():
    worker = GatedWorker()
    batcher = make(worker, num_workers=2, max_batch_tokens=1000)
    futures = batcher.submit([1, 2], [300, 300])
    await worker.wait_entered()
    await worker.wait_entered()
    assert sorted(worker.batches) == [[1], [2]]
    worker.open()
    assert await asyncio.gather(*futures) == [2, 4]
    await batcher.close()


async def test_closing_waits_for_all_workers_and_a_stuck_one_is_not_healthy():
    worker = GatedWorker()
    batcher = make(worker, num_workers=2)
    first = await hold_busy(batcher, worker)
    batcher.check_health(stall_s=60)
    with pytest.raises(SteersmanError):
        batcher.check_health(stall_s=0)
    closing = asyncio.create_task(batcher.close())
    worker.open()
    await closing
    assert await first == 0
    with pytest.raises(SteersmanError):
        batcher.check_health()


async def test_closing_lets_the_running_batch_end_and_fails_the_rest():
    worker = GatedWorker()
    batcher = make(worker)
    running = await hold_busy(batcher, worker)
    (waiting,) = batcher.submit([1], [5])
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0)
    with pytest.raises(SteersmanError, match="shutting down"):
        batcher.submit([2], [5])
    worker.open()
    await closing
    assert await running == 0
    with pytest.raises(SteersmanError) as raised:
        await waiting
    assert raised.value.reason is Reason.ENGINE_UNAVAILABLE
    with pytest.raises(SteersmanError, match="ended"):
        batcher.check_health()


async def test_a_stuck_worker_is_not_healthy():
    worker = GatedWorker()
    batcher = make(worker)
    running = await hold_busy(batcher, worker)
    batcher.check_health(stall_s=3600)
    with pytest.raises(SteersmanError, match="at one batch"):
        batcher.check_health(stall_s=0)
    worker.open()
    await running
    await batcher.close()


async def test_the_observer_sees_depth_size_and_padding():
    worker, recorder = GatedWorker(), Recorder()
    batcher = make(worker, recorder)
    first = await hold_busy(batcher, worker)
    futures = batcher.submit([1, 2], [40, 10])
    worker.open()
    await asyncio.gather(first, *futures)
    await batcher.close()
    assert max(recorder.depths) == 2
    assert recorder.depths[-1] == 0
    record = recorder.records[1]
    assert (record.num_items, record.num_tokens, record.num_padding_tokens, record.num_shared_tokens) == (2, 50, 30, 0)
    assert record.num_failed == 0
    assert record.queue_s >= 0


async def test_the_metrics_have_the_padding_waste():
    metrics = Metrics("test")
    batcher = make(GatedWorker(is_open=True), BatchMetrics(metrics).observer("unit"))
    await batcher.run([1, 2], [40, 10])
    await batcher.close()
    labels = {"batcher": "unit"}
    assert metrics.registry.get_sample_value("steersman_padding_tokens_total", labels) == 30
    assert metrics.registry.get_sample_value("steersman_batched_tokens_total", labels) == 50
    assert metrics.registry.get_sample_value("steersman_queue_depth", labels) == 0


def best_single_split(lengths: list[int], overhead: int) -> int:
    """Tries every split and keeps the cheapest; what `worth_padding` computes with a running best."""
    costs = {len(lengths): lengths[0] * len(lengths)}
    for index in range(1, len(lengths)):
        costs[index] = lengths[0] * index + lengths[index] * (len(lengths) - index) + overhead
    return min(costs.values())


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(0, 100))
def test_worth_padding_takes_the_cheapest_split(lengths, overhead):
    lengths = sorted(lengths, reverse=True)
    keep = worth_padding(lengths, overhead)
    cost = lengths[0] * keep
    if keep < len(lengths):
        cost += lengths[keep] * (len(lengths) - keep) + overhead
    assert cost == best_single_split(lengths, overhead)


@given(st.lists(st.lists(st.integers(1, 120), min_size=1, max_size=20), min_size=1, max_size=8))
def test_every_item_is_run_once_and_within_the_budget(calls):
    async def scenario() -> None:
        worker, recorder = GatedWorker(is_open=True), Recorder()
        batcher = make(worker, recorder, batch_overhead_tokens=8)
        results = await asyncio.gather(*(batcher.run(call, call) for call in calls))
        assert results == [[2 * item for item in call] for call in calls]
        ran = sorted(item for batch in worker.batches for item in batch)
        assert ran == sorted(item for call in calls for item in call)
        assert all(max(batch) * len(batch) <= 100 or len(batch) == 1 for batch in worker.batches)
        await batcher.close()

    asyncio.run(scenario())
