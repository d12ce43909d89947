"""Scores of models through the service: what they are, and how an item or a call fails."""

import grpc
import pytest
from google.protobuf import duration_pb2, struct_pb2
from reward_fakes import (
    INFO,
    LIMIT,
    STATS,
    TIMEOUT,
    VOCAB,
    chat,
    details_of,
    expected_score,
    letters_tokenizer,
    model_scorer,
    reason_of,
    score,
    serving,
    text,
    tiny_model,
    tokens,
)

from steersman.reward.engine.torch_engine import TorchScoreEngine
from steersman.v1 import reward_pb2


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
