"""Scoring by stream."""

import asyncio

import grpc
import numpy as np
import pytest
from reward_fakes import (
    INFO,
    LIMIT,
    TIMEOUT,
    VOCAB,
    GatedEngine,
    details_of,
    expected_score,
    function_scorer,
    grade,
    model_scorer,
    reason_of,
    score,
    serving,
    text,
    tokens,
    until_queued,
)

from steersman.reward.engine.torch_engine import TorchScoreEngine
from steersman.serving.metrics import Metrics
from steersman.v1 import reward_pb2


async def test_a_stream_scores_every_item_once(model):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCAB, rng.integers(1, LIMIT + 1)).tolist() for _ in range(50)]
    async with serving({"m": model_scorer("m", TorchScoreEngine(model, INFO))}) as stub:
        call = stub.StreamScore(timeout=TIMEOUT)
        for start in range(0, 50, 7):
            batch = [tokens(row[:-1], row[-1:], id=str(start + i)) for i, row in enumerate(rows[start : start + 7])]
            await call.write(reward_pb2.StreamScoreRequest(items=batch))
        await call.write(reward_pb2.StreamScoreRequest(items=[tokens([1], [], id="bad")]))
        await call.done_writing()
        results = [result async for response in call for result in response.results]
    by_id = {result.id: result for result in results}
    assert len(results) == 51
    assert reason_of(by_id.pop("bad")) == "INVALID_FIELD"
    for index, row in enumerate(rows):
        assert by_id[str(index)].score == pytest.approx(expected_score(model, row), abs=1e-5)


async def test_a_stream_answers_before_it_has_ended():
    async with serving({"f": function_scorer("f", grade)}) as stub:
        call = stub.StreamScore(timeout=TIMEOUT)
        await call.write(reward_pb2.StreamScoreRequest(items=[text("p", "abc", id="1")]))
        response = await call.read()
        assert [(result.id, result.score) for result in response.results] == [("1", 3.0)]
        await call.write(reward_pb2.StreamScoreRequest(items=[text("p", "ab", id="1")]))
        response = await call.read()
        assert [(result.id, result.score) for result in response.results] == [("1", 2.0)]
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


@pytest.mark.parametrize(
    ("message", "reason", "field"),
    [
        (reward_pb2.StreamScoreRequest(items=[text("p", "r")]), "INVALID_FIELD", "items[0].id"),
        (reward_pb2.StreamScoreRequest(items=[text("p", "r", id="1")] * 2), "INVALID_FIELD", "items[1].id"),
        (reward_pb2.StreamScoreRequest(options=reward_pb2.ScoreOptions(scorer="x")), "NOT_FOUND", ""),
        (
            reward_pb2.StreamScoreRequest(options=reward_pb2.ScoreOptions(priority=7)),
            "INVALID_FIELD",
            "options.priority",
        ),
    ],
)
async def test_a_bad_message_ends_the_stream_with_a_reason(message, reason, field):
    async with serving({"f": function_scorer("f", grade)}) as stub:
        call = stub.StreamScore(timeout=TIMEOUT)
        await call.write(message)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert details_of(raised.value)[:2] == (reason, field)


async def test_a_cancelled_stream_withdraws_its_items():
    engine, metrics = GatedEngine(), Metrics("reward")
    async with serving({"m": model_scorer("m", engine, metrics=metrics)}, metrics) as stub:
        running = asyncio.create_task(score(stub, tokens([1], [1])))
        await engine.wait_entered()
        call = stub.StreamScore(timeout=TIMEOUT)
        await call.write(reward_pb2.StreamScoreRequest(items=[tokens([2], [1], id="doomed")]))
        await until_queued(metrics, 1)
        call.cancel()
        async with asyncio.timeout(TIMEOUT):
            while metrics.registry.get_sample_value("steersman_rpc_in_flight", {"method": "StreamScore"}) != 0:
                await asyncio.sleep(0.001)
        engine.gate.set()
        await running
        await score(stub, tokens([3], [1]))
    assert engine.batches == [[1], [3]]
