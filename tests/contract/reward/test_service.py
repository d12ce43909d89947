"""The reward service behind a real grpc.aio server, with tiny real models and functions that misbehave."""

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
import torch
from google.protobuf import duration_pb2, struct_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

from steersman.reward.engine.port import Normalization
from steersman.reward.engine.torch_engine import TorchScoreEngine
from steersman.reward.function_scorer import FunctionScorer
from steersman.reward.handler import RewardHandler
from steersman.reward.model_scorer import ModelScorer
from steersman.reward.plugin import ScorerInput
from steersman.reward.servicer import RewardService
from steersman.reward.settings import FunctionScorerSettings
from steersman.reward.text import TextEncoder
from steersman.reward.types import Scorer
from steersman.serving.batch_metrics import BatchMetrics
from steersman.serving.batching import BatchingSettings
from steersman.serving.metrics import Metrics
from steersman.serving.server import start_server
from steersman.serving.settings import ServerSettings
from steersman.v1 import reward_pb2, reward_pb2_grpc, types_pb2
from steersman.wire.identity import ModelInfo

TIMEOUT = 20
VOCAB, LIMIT = 64, 12
INFO = ModelInfo(name="tiny", revision="r1", vocab_size=VOCAB, max_sequence_tokens=LIMIT)
STATS = Normalization(mean=0.5, std=2.0)


def tiny_model(*, broken: bool = False) -> Qwen2ForSequenceClassification:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LIMIT,
        initializer_range=0.5,
        num_labels=1,
        pad_token_id=0,
    )
    model = Qwen2ForSequenceClassification(config).eval()
    if broken:
        with torch.no_grad():
            model.model.norm.weight.fill_(float("nan"))
    return model


def letters_tokenizer() -> PreTrainedTokenizerFast:
    characters = ["<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz:;[]<> \nHA"]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(characters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    template = (
        "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
        "[{{ m.role[0] }}]{{ m.content }}{% endfor %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", chat_template=template
    )


@pytest.fixture(scope="module")
def model() -> Qwen2ForSequenceClassification:
    return tiny_model()


def model_scorer(
    name: str, engine, *, with_tokenizer: bool = True, metrics: Metrics | None = None, **batching
) -> ModelScorer:
    encoder = TextEncoder(letters_tokenizer(), "template") if with_tokenizer else None
    observer = BatchMetrics(metrics).observer(name) if metrics is not None else None
    return ModelScorer(name, engine, BatchingSettings(**batching), encoder=encoder, observer=observer)


def function_scorer(name: str, function, **settings) -> FunctionScorer:
    return FunctionScorer(name, function, FunctionScorerSettings(function="m:f", **settings))


@asynccontextmanager
async def serving(
    scorers: Mapping[str, Scorer], metrics: Metrics | None = None
) -> AsyncIterator[reward_pb2_grpc.RewardServiceStub]:
    handler = RewardHandler(scorers, next(iter(scorers)))
    server = await start_server(RewardService(handler), ServerSettings(), metrics or Metrics("reward"))
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield reward_pb2_grpc.RewardServiceStub(channel)
    finally:
        await server.stop()


def tokens(prompt: Sequence[int], response: Sequence[int], **fields) -> reward_pb2.ScoreItem:
    pair = reward_pb2.TokenPair(prompt=types_pb2.TokenIds(ids=prompt), response=types_pb2.TokenIds(ids=response))
    return reward_pb2.ScoreItem(tokens=pair, **fields)


def text(prompt: str, response: str, **fields) -> reward_pb2.ScoreItem:
    return reward_pb2.ScoreItem(text=reward_pb2.TextPair(prompt=prompt, response=response), **fields)


def chat(turns: Sequence[tuple[str, str]], reply: str) -> reward_pb2.ScoreItem:
    messages = [types_pb2.ChatMessage(role=role, content=content) for role, content in turns]
    pair = reward_pb2.ChatPair(
        prompt=types_pb2.Chat(messages=messages), response=types_pb2.ChatMessage(role="assistant", content=reply)
    )
    return reward_pb2.ScoreItem(chat=pair)


def expected_score(model, ids: Sequence[int]) -> float:
    with torch.no_grad():
        return float(model.score(model.model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0, -1]))


async def score(stub, *items: reward_pb2.ScoreItem, **options) -> list[reward_pb2.ItemScore]:
    request = reward_pb2.ScoreRequest(items=items, options=reward_pb2.ScoreOptions(**options))
    return list((await stub.Score(request, timeout=TIMEOUT)).results)


def reason_of(result: reward_pb2.ItemScore) -> str:
    """The reason of an item that failed; an item that failed never has a score."""
    assert not result.HasField("score")
    assert not result.HasField("raw_score")
    return types_pb2.ErrorReason.Name(result.status.reason).removeprefix("ERROR_REASON_")


def details_of(error: grpc.aio.AioRpcError) -> tuple[str, str, float | None]:
    status = rpc_status.from_call(error)
    assert status is not None
    reason, field, retry = "", "", None
    for detail in status.details:
        info, bad, delay = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad):
            field = bad.field_violations[0].field
        elif detail.Unpack(delay):
            retry = delay.retry_delay.ToTimedelta().total_seconds()
    return reason, field, retry


async def test_tokens_text_and_chat_are_scored_as_the_model_does(model):
    made = letters_tokenizer()
    async with serving({"m": model_scorer("m", TorchScoreEngine(model, INFO))}) as stub:
        results = await score(
            stub,
            tokens([5, 6], [7, 8, 9], id="t"),
            tokens([], [7, 8, 9], id="no prompt"),
            text("ab", "cd", id="x"),
            chat([("user", "ab")], "cd"),
        )
    rows = [[5, 6, 7, 8, 9], [7, 8, 9], made("abcd")["input_ids"], made("[u]ab[a]cd")["input_ids"]]
    assert [result.id for result in results] == ["t", "no prompt", "x", ""]
    for result, row in zip(results, rows, strict=True):
        assert result.status.code == 0
        assert result.score == pytest.approx(expected_score(model, row), abs=1e-5)
        assert result.num_tokens == len(row)
        assert (result.scorer, result.revision, result.truncated) == ("m", "r1", False)
        assert not result.HasField("raw_score")


async def test_normalised_and_raw_scores(model):
    engine = TorchScoreEngine(model, INFO, normalization=STATS)
    async with serving({"m": model_scorer("m", engine)}) as stub:
        (result,) = await score(stub, tokens([5], [6]), include_raw=True)
    raw = expected_score(model, [5, 6])
    assert result.raw_score == pytest.approx(raw, abs=1e-5)
    assert result.score == pytest.approx((raw - 0.5) / 2.0, abs=1e-5)


BAD_ITEMS = [
    (reward_pb2.ScoreItem(), "INVALID_FIELD", "items[1].content"),
    (tokens([1], []), "INVALID_FIELD", "items[1].tokens.response"),
    (text("a", ""), "INVALID_FIELD", "items[1].text.response"),
    (chat([("user", "a")], ""), "INVALID_FIELD", "items[1].chat.response.content"),
    (chat([], "a"), "INVALID_FIELD", "items[1].chat.prompt.messages"),
    (chat([("robot", "a")], "b"), "INVALID_FIELD", "items[1].chat"),
    (tokens([1, VOCAB], [1]), "TOKEN_OUT_OF_VOCABULARY", "items[1].tokens.prompt.ids[1]"),
    (tokens([1, 2], [3, -1]), "TOKEN_OUT_OF_VOCABULARY", "items[1].tokens.response.ids[1]"),
    (tokens([1] * LIMIT, [2]), "SEQUENCE_TOO_LONG", "items[1]"),
    (text("a" * LIMIT, "b"), "SEQUENCE_TOO_LONG", "items[1]"),
]


@pytest.mark.parametrize(("bad", "reason", "field"), BAD_ITEMS)
async def test_a_bad_item_fails_with_a_reason_and_the_others_are_scored(model, bad, reason, field):
    async with serving({"m": model_scorer("m", TorchScoreEngine(model, INFO))}) as stub:
        first, failed, last = await score(stub, tokens([1], [2]), bad, text("a", "b"))
    assert first.HasField("score")
    assert last.HasField("score")
    assert reason_of(failed) == reason
    assert failed.status.message.startswith(field + " is ")
    assert "allowed: " in failed.status.message
    assert failed.status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


async def test_text_for_a_model_without_a_tokenizer_fails(model):
    scorer = model_scorer("m", TorchScoreEngine(model, INFO), with_tokenizer=False)
    async with serving({"m": scorer}) as stub:
        good, failed = await score(stub, tokens([1], [2]), text("a", "b"))
    assert good.HasField("score")
    assert reason_of(failed) == "INVALID_FIELD"


async def test_truncation_drops_the_oldest_prompt_tokens_and_says_so(model):
    async with serving({"m": model_scorer("m", TorchScoreEngine(model, INFO))}) as stub:
        prompt = list(range(1, 11))
        cut, whole, hopeless = await score(
            stub,
            tokens(prompt, [20, 21, 22, 23]),
            tokens([1], [2]),
            tokens([1], [2] * (LIMIT + 1)),
            overlength=reward_pb2.OVERLENGTH_TRUNCATE_PROMPT,
        )
    assert cut.truncated
    assert cut.num_tokens == LIMIT
    assert cut.score == pytest.approx(expected_score(model, [*prompt[2:], 20, 21, 22, 23]), abs=1e-5)
    assert not whole.truncated
    assert reason_of(hopeless) == "SEQUENCE_TOO_LONG"


async def test_a_model_that_gives_nan_fails_its_items():
    async with serving({"m": model_scorer("m", TorchScoreEngine(tiny_model(broken=True), INFO))}) as stub:
        (failed,) = await score(stub, tokens([1], [2]))
    assert reason_of(failed) == "NOT_FINITE"


@pytest.mark.parametrize(
    ("request_message", "code", "reason", "field"),
    [
        (reward_pb2.ScoreRequest(), "INVALID_ARGUMENT", "INVALID_FIELD", "items"),
        (
            reward_pb2.ScoreRequest(
                items=[
                    text("a", "b", context=struct_pb2.Struct(fields={"a": struct_pb2.Value(number_value=float("nan"))}))
                ]
            ),
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "items[0].context",
        ),
        (
            reward_pb2.ScoreRequest(items=[text("a", "b", timeout=duration_pb2.Duration(seconds=2**62))]),
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "items[0].timeout",
        ),
        (reward_pb2.ScoreRequest(items=[text("a", "b")] * 1025), "INVALID_ARGUMENT", "REQUEST_TOO_LARGE", "items"),
        (
            reward_pb2.ScoreRequest(items=[text("a", "b")], options=reward_pb2.ScoreOptions(scorer="x")),
            "NOT_FOUND",
            "NOT_FOUND",
            "",
        ),
        (
            reward_pb2.ScoreRequest(items=[text("a", "b")], options=reward_pb2.ScoreOptions(overlength=9)),
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "options.overlength",
        ),
        (
            reward_pb2.ScoreRequest(items=[text("a", "b")], options=reward_pb2.ScoreOptions(priority=9)),
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "options.priority",
        ),
    ],
)
async def test_a_bad_call_fails_as_a_whole(model, request_message, code, reason, field):
    async with serving({"m": model_scorer("m", TorchScoreEngine(model, INFO))}) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Score(request_message, timeout=TIMEOUT)
        assert raised.value.code().name == code
        assert details_of(raised.value)[:2] == (reason, field)
        (good,) = await score(stub, text("a", "b"))
    assert good.HasField("score")


def grade(items: Sequence[ScorerInput]) -> list[float | None]:
    """Scores by the word that the response is."""
    words = [item.response for item in items]
    if "raise" in words:
        raise RuntimeError("as told")
    special: dict[str, float | None] = {"none": None, "nan": float("nan")}
    return [special.get(word, float(len(word))) for word in words]


async def test_functions_that_raise_or_give_nothing_fail_their_items():
    async with serving({"f": function_scorer("f", grade)}) as stub:
        results = await score(stub, *(text("p", word) for word in ("abc", "raise", "none", "nan", "ab")))
    assert [result.score for result in (results[0], results[4])] == [3.0, 2.0]
    assert [reason_of(result) for result in results[1:4]] == ["SCORER_FAILED", "SCORER_FAILED", "NOT_FINITE"]
    assert results[0].revision == ""
    assert results[0].num_tokens == 0


async def test_a_function_that_hangs_fails_its_item_and_no_other():
    release = threading.Event()

    def slow(items: Sequence[ScorerInput]) -> list[float]:
        if any(item.response == "hang" for item in items):
            release.wait(TIMEOUT)
        return [1.0] * len(items)

    async with serving({"f": function_scorer("f", slow, timeout_seconds=0.05)}) as stub:
        good, failed = await score(stub, text("p", "ok"), text("p", "hang"))
        release.set()
    assert good.score == 1.0
    assert reason_of(failed) == "SCORER_FAILED"


async def test_context_reaches_a_function():
    def matches(items: Sequence[ScorerInput]) -> list[float]:
        return [float(item.response == item.context.get("ground_truth")) for item in items]

    context = struct_pb2.Struct()
    context.update({"ground_truth": "42"})
    async with serving({"f": function_scorer("f", matches)}) as stub:
        right, wrong, without = await score(
            stub, text("q", "42", context=context), text("q", "41", context=context), text("q", "42")
        )
    assert [right.score, wrong.score, without.score] == [1.0, 0.0, 0.0]


async def test_token_ids_for_a_function_are_decoded_if_it_has_a_tokenizer():
    plain = function_scorer("plain", grade)
    settings = FunctionScorerSettings(function="m:f", tokenizer="letters")
    decoding = FunctionScorer("decoding", grade, settings, decoder=TextEncoder(letters_tokenizer(), "template"))
    ids = letters_tokenizer()("abc")["input_ids"]
    async with serving({"plain": plain, "decoding": decoding}) as stub:
        (failed,) = await score(stub, tokens([], ids))
        (good,) = await score(stub, tokens([], ids), scorer="decoding")
    assert reason_of(failed) == "INVALID_FIELD"
    assert good.HasField("score")
    assert good.scorer == "decoding"


async def test_list_scorers(model):
    scorers = {"z": model_scorer("z", TorchScoreEngine(model, INFO)), "a": function_scorer("a", grade)}
    async with serving(scorers) as stub:
        response = await stub.ListScorers(reward_pb2.ListScorersRequest(), timeout=TIMEOUT)
    first, second = response.scorers
    assert (first.name, first.kind, first.is_default) == ("a", reward_pb2.SCORER_KIND_FUNCTION, False)
    assert not first.HasField("model")
    assert (second.name, second.kind, second.is_default) == ("z", reward_pb2.SCORER_KIND_MODEL, True)
    assert (second.model.revision, second.model.vocab_size) == ("r1", VOCAB)


class GatedEngine:
    """Scores 0 when the test lets it."""

    model = INFO
    normalization = Normalization()
    shares_prefixes = False

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.batches: list[list[int]] = []

    def close(self) -> None:
        pass

    def score(self, rows: Sequence[np.ndarray]) -> list[float]:
        self.batches.append([int(row[0]) for row in rows])
        self.entered.release()
        assert self.gate.wait(TIMEOUT)
        return [0.0] * len(rows)

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=TIMEOUT)


async def until_queued(metrics: Metrics, num_items: int) -> None:
    """Waits for a metric, the only thing outside that shows items in the queue."""
    async with asyncio.timeout(TIMEOUT):
        while metrics.registry.get_sample_value("steersman_queue_depth", {"batcher": "m"}) != num_items:
            await asyncio.sleep(0.001)


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
