"""Checks of requests, and the bounded queue."""

import asyncio
from contextlib import aclosing

import pytest
from policy_fakes import MAX_SEQUENCE_TOKENS, VOCAB_SIZE, FakeEngine

from steersman.policy.engine.port import SampleDelta
from steersman.policy.handler import GenerateCall, GenerationHandler
from steersman.policy.metrics import PolicyMetrics
from steersman.serving.metrics import Metrics
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.identity import WeightVersion

IDS = [1, 2, 3]


def handler_of(engine: FakeEngine, max_samples: int = 8) -> GenerationHandler:
    return GenerationHandler(
        engine,
        PolicyMetrics(Metrics("policy")),
        active_version=lambda: engine.version,
        revision="r0",
        max_samples=max_samples,
    )


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def handler(engine: FakeEngine) -> GenerationHandler:
    return handler_of(engine)


@pytest.mark.parametrize(
    ("call", "field", "allowed"),
    [
        (GenerateCall(), "prompt", "one of prompt_token_ids"),
        (GenerateCall(prompt_token_ids=[]), "prompt_token_ids.ids", "at least one token"),
        (GenerateCall(chat=[]), "chat.messages", "at least one message"),
        (GenerateCall(chat=[("alien", "hi")]), "chat.messages", "turns that the template takes"),
        (GenerateCall(text=""), "text", "at least one token; the tokenizer of this model makes none of it"),
        (GenerateCall(chat=[("", "")]), "chat", "the tokenizer of this model makes none of it"),
        (GenerateCall(prompt_token_ids=IDS, num_samples=0), "sampling.num_samples", "[1, 256]"),
        (GenerateCall(prompt_token_ids=IDS, num_samples=257), "sampling.num_samples", "[1, 256]"),
        (GenerateCall(prompt_token_ids=IDS, temperature=-1), "sampling.temperature", "[0.01, 100]"),
        (GenerateCall(prompt_token_ids=IDS, temperature=0.001), "sampling.temperature", "0, or"),
        (GenerateCall(prompt_token_ids=IDS, temperature=float("nan")), "sampling.temperature", "0, or"),
        (GenerateCall(prompt_token_ids=IDS, temperature=float("inf")), "sampling.temperature", "0, or"),
        (GenerateCall(prompt_token_ids=IDS, top_p=0), "sampling.top_p", "(0, 1]"),
        (GenerateCall(prompt_token_ids=IDS, top_p=1.5), "sampling.top_p", "(0, 1]"),
        (GenerateCall(prompt_token_ids=IDS, top_p=float("nan")), "sampling.top_p", "(0, 1]"),
        (GenerateCall(prompt_token_ids=IDS, top_k=-1), "sampling.top_k", "at least 0"),
        (GenerateCall(prompt_token_ids=IDS, max_tokens=0), "sampling.max_tokens", "at least 1"),
        (GenerateCall(prompt_token_ids=IDS, max_tokens=2, min_tokens=3), "sampling.min_tokens", "[0, 2]"),
        (GenerateCall(prompt_token_ids=IDS, min_tokens=-1), "sampling.min_tokens", "[0, 17]"),
        (GenerateCall(prompt_token_ids=IDS, seed=-1), "sampling.seed", "[0, "),
        (GenerateCall(prompt_token_ids=IDS, stop=["x"] * 17), "sampling.stop", "at most 16"),
        (GenerateCall(prompt_token_ids=IDS, stop=["x", ""]), "sampling.stop", "not empty"),
        (GenerateCall(prompt_token_ids=IDS, stop_token_ids=[1] * 65), "sampling.stop_token_ids", "at most 64"),
    ],
)
def test_a_bad_field_is_named(handler: GenerationHandler, call: GenerateCall, field: str, allowed: str) -> None:
    with pytest.raises(SteersmanError) as caught:
        handler.check(call)
    assert caught.value.reason is Reason.INVALID_FIELD
    (violation,) = caught.value.violations
    assert violation.field == field
    assert allowed in violation.description


def test_all_bad_sampling_fields_are_named_at_once(handler: GenerationHandler) -> None:
    with pytest.raises(SteersmanError) as caught:
        handler.check(GenerateCall(prompt_token_ids=IDS, temperature=-1, top_p=7, seed=-3))
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["sampling.temperature", "sampling.top_p", "sampling.seed"]


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 2**31 - 1])
def test_tokens_outside_the_vocabulary_are_named(handler: GenerationHandler, token: int) -> None:
    with pytest.raises(SteersmanError) as caught:
        handler.check(GenerateCall(prompt_token_ids=[1, token, 2]))
    assert caught.value.reason is Reason.TOKEN_OUT_OF_VOCABULARY
    assert caught.value.message == f"prompt_token_ids.ids[1] is {token}, allowed: [0, {VOCAB_SIZE})"
    with pytest.raises(SteersmanError, match=r"stop_token_ids\[0\]"):
        handler.check(GenerateCall(prompt_token_ids=[1], stop_token_ids=[token]))


def test_a_prompt_that_leaves_no_room_is_too_long(handler: GenerationHandler) -> None:
    with pytest.raises(SteersmanError, match="prompt is '20 tokens', allowed: at most 19") as caught:
        handler.check(GenerateCall(prompt_token_ids=[1] * MAX_SEQUENCE_TOKENS))
    assert caught.value.reason is Reason.SEQUENCE_TOO_LONG
    assert handler.check(GenerateCall(prompt_token_ids=[1] * (MAX_SEQUENCE_TOKENS - 1))).max_tokens == 1


def test_more_tokens_than_fit_are_too_many(handler: GenerationHandler) -> None:
    with pytest.raises(SteersmanError, match=r"max_tokens is 18, allowed: \[1, 17\]") as caught:
        handler.check(GenerateCall(prompt_token_ids=IDS, max_tokens=18))
    assert caught.value.reason is Reason.SEQUENCE_TOO_LONG


def test_defaults(handler: GenerationHandler) -> None:
    request = handler.check(GenerateCall(prompt_token_ids=IDS))
    assert (request.num_samples, request.temperature, request.top_p, request.top_k) == (1, 1.0, 1.0, 0)
    assert (request.max_tokens, request.seed) == (MAX_SEQUENCE_TOKENS - len(IDS), None)


def test_greedy_and_single_sample_zero_values_are_kept(handler: GenerationHandler) -> None:
    # What 0.01 becomes in the float32 of a request.
    assert handler.check(GenerateCall(prompt_token_ids=IDS, temperature=0.009999999776482582)).temperature < 0.01
    request = handler.check(GenerateCall(prompt_token_ids=IDS, temperature=0, seed=0))
    assert (request.temperature, request.seed) == (0, 0)


@pytest.mark.parametrize(
    "call",
    [
        GenerateCall(text="hi"),
        GenerateCall(chat=[("user", "hi")]),
        GenerateCall(prompt_token_ids=IDS, stop=["x"]),
        GenerateCall(prompt_token_ids=IDS, return_text=True),
    ],
)
async def test_text_needs_a_tokenizer(call: GenerateCall) -> None:
    with pytest.raises(SteersmanError, match=r"this model has no (tokenizer|chat template)"):
        handler_of(FakeEngine(has_tokenizer=False)).check(call)


async def test_samples_stream_and_are_counted(handler: GenerationHandler, engine: FakeEngine) -> None:
    request = handler.check(GenerateCall(prompt_token_ids=IDS, num_samples=2, max_tokens=3))
    deltas = [delta async for delta in handler.generate(request)]
    assert [delta.token_ids for delta in deltas if delta.index == 1] == [[4], [5], [6]]
    assert handler.num_samples == 0


async def test_a_full_queue_refuses_until_there_is_room(engine: FakeEngine) -> None:
    handler = handler_of(engine, max_samples=3)
    engine.gate.clear()
    request = handler.check(GenerateCall(prompt_token_ids=IDS, num_samples=2, max_tokens=2))

    async def collect() -> list[SampleDelta]:
        return [delta async for delta in handler.generate(request)]

    first = asyncio.create_task(collect())
    await engine.started.wait()
    assert (handler.num_samples, handler.num_tokens) == (2, 2 * (len(IDS) + 2))
    with pytest.raises(SteersmanError) as caught:
        await anext(handler.generate(request))
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after_seconds
    engine.gate.set()
    assert len(await first) == 4
    assert len(await collect()) == 4
    assert (handler.num_samples, handler.num_tokens) == (0, 0)


async def test_more_samples_than_the_queue_holds_run_when_it_is_empty(engine: FakeEngine) -> None:
    handler = handler_of(engine, max_samples=3)
    request = handler.check(GenerateCall(prompt_token_ids=IDS, num_samples=5, max_tokens=1))
    assert len([delta async for delta in handler.generate(request)]) == 5


async def test_closing_the_stream_aborts_in_the_engine(handler: GenerationHandler, engine: FakeEngine) -> None:
    request = handler.check(GenerateCall(prompt_token_ids=IDS, max_tokens=5))
    async with aclosing(handler.generate(request)) as deltas:
        await anext(deltas)
    assert engine.events == ["aborted"]
    assert handler.num_samples == 0


async def test_a_dead_engine_is_unavailable(handler: GenerationHandler, engine: FakeEngine) -> None:
    engine.dead = True
    with pytest.raises(SteersmanError) as caught:
        await anext(handler.generate(handler.check(GenerateCall(prompt_token_ids=IDS))))
    assert caught.value.reason is Reason.ENGINE_UNAVAILABLE


async def test_the_model_tells_the_active_weights(handler: GenerationHandler, engine: FakeEngine) -> None:
    engine.version = WeightVersion(run_id="r", step=3)
    assert handler.model().weight_version == engine.version
    assert handler.model().revision == "r0"
