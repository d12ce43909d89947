"""Checks, batching and failures of the reference handler, on an engine that computes nothing."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from steersman.reference.engine.port import LogprobQuery, LogprobRow
from steersman.reference.handler import LogprobRequest, ReferenceHandler, check
from steersman.serving.batching import BatchingSettings
from steersman.serving.service import EngineDead
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.identity import ModelInfo

MODEL = ModelInfo(name="fake", vocab_size=100, max_sequence_tokens=16)
BAD_TOKEN = 66


class FakeEngine:
    """The log-prob of a token is minus its id; token 66 has none; `error` is raised if set."""

    model = MODEL
    shares_prefixes = False

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.error: Exception | None = None

    def compute(self, queries: Sequence[LogprobQuery]) -> list[LogprobRow]:
        self.batches.append([len(query.token_ids) for query in queries])
        if self.error is not None:
            raise self.error
        rows = []
        for query in queries:
            response = query.token_ids[query.prompt_length :]
            logprobs = np.where(response == BAD_TOKEN, np.nan, -response / query.temperature).astype(np.float32)
            rows.append(LogprobRow(logprobs=logprobs, entropies=logprobs * 0 if query.include_entropy else None))
        return rows


def rows(*lists: list[int]) -> list[np.ndarray]:
    return [np.array(values, np.int32) for values in lists]


GOOD = [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("request_fields", "reason", "field", "allowed"),
    [
        ({"token_ids": []}, Reason.INVALID_FIELD, "token_ids", "1 to 1024 rows"),
        ({"token_ids": rows(*[[1, 2]] * 1025)}, Reason.REQUEST_TOO_LARGE, "token_ids", "1 to 1024 rows"),
        ({"token_ids": rows(GOOD, [5])}, Reason.INVALID_FIELD, "token_ids[1]", "at least 2 tokens"),
        ({"token_ids": rows(GOOD, [])}, Reason.INVALID_FIELD, "token_ids[1]", "at least 2 tokens"),
        ({"token_ids": rows(GOOD, [1] * 17)}, Reason.SEQUENCE_TOO_LONG, "token_ids[1]", "at most 16 tokens"),
        ({"token_ids": rows(GOOD, [1, 100])}, Reason.TOKEN_OUT_OF_VOCABULARY, "token_ids[1][1]", "0 to 99"),
        ({"token_ids": rows([-1, 2])}, Reason.TOKEN_OUT_OF_VOCABULARY, "token_ids[0][0]", "0 to 99"),
        *(
            ({"temperature": value}, Reason.INVALID_FIELD, "temperature", r"[0.01, 100]")
            for value in (0.0, -1.0, 1e-45, 0.0099, 100.1, float("nan"), float("inf"))
        ),
        ({"prompt_lengths": np.array([1, 1], np.int32)}, Reason.INVALID_FIELD, "prompt_lengths.shape", "[1]"),
        ({"prompt_lengths": np.array([0], np.int32)}, Reason.INVALID_FIELD, "prompt_lengths[0]", "1 to 3"),
        ({"prompt_lengths": np.array([4], np.int32)}, Reason.INVALID_FIELD, "prompt_lengths[0]", "1 to 3"),
    ],
)
def test_a_bad_request_names_field_and_range(request_fields, reason, field, allowed):
    request = LogprobRequest(**({"token_ids": rows(GOOD)} | request_fields))
    with pytest.raises(SteersmanError) as raised:
        check(request, MODEL)
    assert raised.value.reason is reason
    (violation,) = raised.value.violations
    assert violation.field == field
    assert allowed in violation.description


async def test_rows_come_back_in_order_with_the_response_only():
    handler = ReferenceHandler(FakeEngine(), BatchingSettings())
    request = LogprobRequest(
        token_ids=rows([1, 2, 3], [4, 5, 6, 7]),
        prompt_lengths=np.array([1, 3], np.int32),
        temperature=2.0,
        include_entropy=True,
    )
    first, second = await handler.compute_logprobs(request)
    assert first.logprobs.tolist() == [-1.0, -1.5]
    assert second.logprobs.tolist() == [-3.5]
    assert second.entropies is not None
    await handler.close()


async def test_default_prompt_length_is_one():
    handler = ReferenceHandler(FakeEngine(), BatchingSettings())
    (row,) = await handler.compute_logprobs(LogprobRequest(token_ids=rows([1, 2, 3])))
    assert row.logprobs.tolist() == [-2.0, -3.0]
    await handler.close()


async def test_nan_fails_the_call_that_has_it_and_no_other():
    handler = ReferenceHandler(FakeEngine(), BatchingSettings())
    bad = handler.compute_logprobs(LogprobRequest(token_ids=rows([1, BAD_TOKEN], [1, 2])))
    good = handler.compute_logprobs(LogprobRequest(token_ids=rows([1, 2])))
    error, answer = await asyncio.gather(bad, good, return_exceptions=True)
    assert isinstance(error, SteersmanError)
    assert error.reason is Reason.NOT_FINITE
    assert answer[0].logprobs.tolist() == [-2.0]
    await handler.close()


async def test_an_engine_that_fails_at_everything_is_dead():
    engine = FakeEngine()
    handler = ReferenceHandler(engine, BatchingSettings())
    engine.error = RuntimeError("device lost")
    for _ in range(7):
        with pytest.raises(RuntimeError):
            await handler.compute_logprobs(LogprobRequest(token_ids=rows(GOOD)))
    await handler.check_health()
    with pytest.raises(RuntimeError):
        await handler.compute_logprobs(LogprobRequest(token_ids=rows(GOOD)))
    with pytest.raises(EngineDead):
        await handler.check_health()
    await handler.close()


async def test_an_engine_that_fails_at_some_inputs_is_not_dead():
    engine = FakeEngine()
    handler = ReferenceHandler(engine, BatchingSettings())
    engine.error = RuntimeError("out of memory")
    for _ in range(8):
        with pytest.raises(RuntimeError):
            await handler.compute_logprobs(LogprobRequest(token_ids=rows(GOOD)))
    engine.error = None
    await handler.check_health()
    num_batches = len(engine.batches)
    # The sign of life was a success: it is not asked for again.
    await handler.check_health()
    assert len(engine.batches) == num_batches
    await handler.close()


async def test_the_engine_runs_off_the_event_loop():
    threads: list[int] = []

    class Spy(FakeEngine):
        def compute(self, queries: Sequence[LogprobQuery]) -> list[LogprobRow]:
            threads.append(threading.get_ident())
            return super().compute(queries)

    handler = ReferenceHandler(Spy(), BatchingSettings())
    await handler.warm_up()
    assert threads
    assert threading.get_ident() not in threads
    await handler.close()
