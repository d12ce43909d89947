"""Scores of functions through the service, also of those that misbehave."""

import threading
from collections.abc import Sequence

from google.protobuf import struct_pb2
from reward_fakes import (
    INFO,
    TIMEOUT,
    VOCAB,
    function_scorer,
    grade,
    letters_tokenizer,
    model_scorer,
    reason_of,
    score,
    serving,
    text,
    tokens,
)

from steersman.reward.engine.torch_engine import TorchScoreEngine
from steersman.reward.function_scorer import FunctionScorer
from steersman.reward.plugin import ScorerInput
from steersman.reward.settings import FunctionScorerSettings
from steersman.reward.text import TextEncoder
from steersman.v1 import reward_pb2


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
