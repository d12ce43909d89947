"""Who is scored first, who is refused, and who is not scored any more."""

import asyncio

import grpc
import pytest
from google.protobuf import duration_pb2
from reward_fakes import TIMEOUT, GatedEngine, details_of, model_scorer, reason_of, score, serving, tokens, until_queued

from steersman.serving.metrics import Metrics
from steersman.v1 import reward_pb2


async def test_a_full_queue_says_when_to_try_again():
    engine, metrics = GatedEngine(), Metrics("reward")
    async with serving({"m": model_scorer("m", engine, metrics=metrics, max_queue_items=2)}, metrics) as stub:
        running = asyncio.create_task(score(stub, tokens([1], [1])))
        await engine.wait_entered()
        waiting = asyncio.create_task(score(stub, tokens([2], [1]), tokens([3], [1])))
        await until_queued(metrics, 2)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await score(stub, tokens([4], [1]))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        reason, _, retry = details_of(raised.value)
        assert reason == "QUEUE_FULL"
        assert retry is not None
        assert retry > 0
        engine.gate.set()
        assert len(await running) == 1
        assert len(await waiting) == 2


async def test_an_item_past_its_own_deadline_fails_and_the_others_are_scored():
    engine, metrics = GatedEngine(), Metrics("reward")
    async with serving({"m": model_scorer("m", engine, metrics=metrics)}, metrics) as stub:
        running = asyncio.create_task(score(stub, tokens([1], [1])))
        await engine.wait_entered()
        deadline = duration_pb2.Duration(nanos=1_000_000)
        item = asyncio.create_task(score(stub, tokens([2], [1], timeout=deadline)))
        (late,) = await item
        assert reason_of(late) == "DEADLINE_EXCEEDED"
        engine.gate.set()
        (result,) = await running
        assert result.HasField("score")
        await score(stub, tokens([3], [1]))
    assert engine.batches == [[1], [3]]


async def test_the_items_of_a_cancelled_call_are_not_scored():
    engine, metrics = GatedEngine(), Metrics("reward")
    async with serving({"m": model_scorer("m", engine, metrics=metrics)}, metrics) as stub:
        running = asyncio.create_task(score(stub, tokens([1], [1])))
        await engine.wait_entered()
        doomed = asyncio.create_task(score(stub, *[tokens([2], [1])] * 3))
        await until_queued(metrics, 3)
        doomed.cancel()
        async with asyncio.timeout(TIMEOUT):
            while metrics.registry.get_sample_value("steersman_rpc_in_flight", {"method": "Score"}) != 1:
                await asyncio.sleep(0.001)
        engine.gate.set()
        await running
        await score(stub, tokens([3], [1]))
    assert engine.batches == [[1], [3]]


async def test_interactive_calls_go_before_bulk_ones():
    engine, metrics = GatedEngine(), Metrics("reward")
    scorer = model_scorer("m", engine, metrics=metrics, max_batch_items=1)
    async with serving({"m": scorer}, metrics) as stub:
        running = asyncio.create_task(score(stub, tokens([1], [1])))
        await engine.wait_entered()
        bulk = asyncio.create_task(score(stub, tokens([2], [1]), tokens([2], [1])))
        await until_queued(metrics, 2)
        urgent = asyncio.create_task(score(stub, tokens([3], [1]), priority=reward_pb2.PRIORITY_CLASS_INTERACTIVE))
        await until_queued(metrics, 3)
        engine.gate.set()
        await asyncio.gather(running, bulk, urgent)
    assert engine.batches == [[1], [3], [2], [2]]
