"""Several rewards in one server: ensembles, normalisation, length penalty, scores by content; the answer tells each."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

from steersman.reward.build import build_handler
from steersman.reward.plugin import ScorerInput
from steersman.reward.servicer import RewardService
from steersman.reward.settings import RewardSettings
from steersman.serving.metrics import Metrics
from steersman.serving.server import start_server
from steersman.serving.settings import ServerSettings
from steersman.v1 import reward_pb2, reward_pb2_grpc, types_pb2

TIMEOUT = 30
ROW = [5, 6, 7, 8]
LIMIT = 12


def save_tiny(folder: Path, seed: int, *, broken: bool = False, **config: Any) -> float:
    """Writes a checkpoint with a tokenizer of letters; returns its raw score of ROW."""
    torch.manual_seed(seed)
    settings = Qwen2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LIMIT,
        initializer_range=0.5,
        num_labels=1,
        pad_token_id=0,
        **config,
    )
    model = Qwen2ForSequenceClassification(settings).eval()
    characters = ["<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz "]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(characters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    with torch.no_grad():
        if broken:
            model.model.norm.weight.fill_(float("nan"))
        model.save_pretrained(folder)
        return float(model.score(model.model(input_ids=torch.tensor([ROW])).last_hidden_state[0, -1])[0])


def normalise(folder: Path, **values: Any) -> None:
    (folder / "reward_normalization.json").write_text(json.dumps({"version": 1, **values}))


class Zoo:
    """Checkpoints and what they say of ROW, raw."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.plain = save_tiny(root / "plain", 0)
        self.scaled = save_tiny(root / "scaled", 1)
        normalise(root / "scaled", mean=0.25, std=2.0, reference="chosen responses")
        self.configured = save_tiny(root / "configured", 2, reward_mean=-1.0, reward_std=0.5)
        save_tiny(root / "nan", 3, broken=True)

    def path(self, name: str) -> str:
        return str(self.root / name)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("models"))


hanging = threading.Event()


def by_word(items: Sequence[ScorerInput]) -> list[float | None]:
    """Scores by the number that the context says; raises, hangs, or gives nothing, if the response asks for it."""
    values: list[float | None] = []
    for item in items:
        if item.response == "raise":
            raise RuntimeError("as told")
        if item.response == "hang":
            hanging.wait(TIMEOUT)
        values.append(None if item.response == "none" else float(item.context.get("value", 1.0)))
    return values


@asynccontextmanager
async def serving(**scorers: dict[str, Any]) -> AsyncIterator[reward_pb2_grpc.RewardServiceStub]:
    async with served_with(Metrics("reward"), **scorers) as stub:
        yield stub


@asynccontextmanager
async def served_with(metrics: Metrics, **scorers: dict[str, Any]) -> AsyncIterator[reward_pb2_grpc.RewardServiceStub]:
    handler, manager = await build_handler(RewardSettings(scorers=scorers), metrics)
    server = await start_server(RewardService(handler, manager), ServerSettings(), metrics)
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield reward_pb2_grpc.RewardServiceStub(channel)
    finally:
        await server.stop()


def tokens(row: Sequence[int] = ROW, num_response: int = 2, **fields: Any) -> reward_pb2.ScoreItem:
    at = len(row) - num_response
    pair = reward_pb2.TokenPair(prompt=types_pb2.TokenIds(ids=row[:at]), response=types_pb2.TokenIds(ids=row[at:]))
    return reward_pb2.ScoreItem(tokens=pair, **fields)


def text(response: str, **context: Any) -> reward_pb2.ScoreItem:
    item = reward_pb2.ScoreItem(text=reward_pb2.TextPair(prompt="ab", response=response))
    item.context.update(context)
    return item


async def score(stub: Any, *items: reward_pb2.ScoreItem, **options: Any) -> list[reward_pb2.ItemScore]:
    request = reward_pb2.ScoreRequest(items=items, options=reward_pb2.ScoreOptions(**options))
    return list((await stub.Score(request, timeout=TIMEOUT)).results)


def reason_of(outcome: reward_pb2.ItemScore | reward_pb2.MemberScore) -> str:
    assert not outcome.HasField("score")
    return types_pb2.ErrorReason.Name(outcome.status.reason).removeprefix("ERROR_REASON_")


FUNCTION = {"function": f"{__file__}:by_word"}


async def test_scores_are_normalised_as_the_model_says_and_raw_ones_are_told(zoo):
    named = {name: {"model": zoo.path(name)} for name in ("plain", "scaled", "configured")}
    off = {"model": zoo.path("scaled"), "normalize": "off"}
    async with serving(**named, off=off) as stub:
        found = {}
        for name in (*named, "off"):
            (found[name],) = await score(stub, tokens(), scorer=name, include_raw=True)
    expected = {
        "plain": (zoo.plain, zoo.plain),
        "scaled": (zoo.scaled, (zoo.scaled - 0.25) / 2.0),
        "configured": (zoo.configured, (zoo.configured + 1.0) / 0.5),
        "off": (zoo.scaled, zoo.scaled),
    }
    for name, (raw, value) in expected.items():
        assert found[name].raw_score == pytest.approx(raw, abs=1e-5)
        assert found[name].score == pytest.approx(value, abs=1e-5)
        assert not found[name].HasField("length_penalty")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"version": 2, "mean": 0, "std": 1}',
        '{"version": 1, "mean": 0, "std": 0}',
        '{"version": 1, "mean": NaN, "std": 1}',
        '{"version": 1, "mean": "0", "std": 1}',
        '{"version": 1, "mean": 0}',
    ],
)
async def test_a_normalisation_that_cannot_be_used_is_said_at_start(tmp_path, content):
    save_tiny(tmp_path / "m", 0)
    (tmp_path / "m" / "reward_normalization.json").write_text(content)
    settings = RewardSettings(scorers={"m": {"model": str(tmp_path / "m")}})
    with pytest.raises(ValueError, match=r"scorers\.m\.model: its reward_normalization\.json"):
        await build_handler(settings, Metrics("reward"))


async def test_a_model_with_another_normalisation_is_another_revision(tmp_path):
    save_tiny(tmp_path / "m", 0)
    revisions = []
    for mean in (None, 1.0, 2.0):
        if mean is not None:
            normalise(tmp_path / "m", mean=mean, std=1.0)
        async with serving(m={"model": str(tmp_path / "m")}) as stub:
            (result,) = await score(stub, tokens())
            revisions.append(result.revision)
    assert len(set(revisions)) == 3


async def test_a_long_response_costs_what_the_settings_say(zoo):
    penalty = {"per_token": 0.5, "free_tokens": 1}
    async with serving(
        m={"model": zoo.path("scaled"), "length_penalty": penalty},
        f={**FUNCTION, "length_penalty": penalty, "tokenizer": zoo.path("plain")},
    ) as stub:
        free, one, two = await score(stub, *(tokens(num_response=n) for n in (1, 2, 3)), include_raw=True)
        (written,) = await score(stub, text("abcd"), scorer="m")
        graded, counted = await score(stub, text("abcd", value=3.0), tokens(num_response=3), scorer="f")
    value = (zoo.scaled - 0.25) / 2.0
    assert [result.length_penalty for result in (free, one, two)] == [0.0, 0.5, 1.0]
    assert [result.score for result in (free, one, two)] == pytest.approx([value, value - 0.5, value - 1.0], abs=1e-5)
    assert free.HasField("length_penalty")
    assert two.raw_score == pytest.approx(zoo.scaled, abs=1e-5)
    assert written.length_penalty == 1.5
    assert (graded.score, graded.length_penalty) == (1.5, 1.5)
    assert (counted.score, counted.length_penalty) == (0.0, 1.0)


async def test_an_ensemble_tells_what_each_member_said(zoo):
    async with serving(
        plain={"model": zoo.path("plain")},
        scaled={"model": zoo.path("scaled"), "length_penalty": {"per_token": 0.25}},
        careful={"ensemble": ["plain", "scaled"], "combine": "uncertainty", "beta": 2.0},
    ) as stub:
        (result,) = await score(stub, tokens(), scorer="careful", include_raw=True)
        (alone,) = await score(stub, tokens(), scorer="scaled")
        listed = (await stub.ListScorers(reward_pb2.ListScorersRequest(), timeout=TIMEOUT)).scorers
    values = [zoo.plain, (zoo.scaled - 0.25) / 2.0 - 0.5]
    spread = abs(values[0] - values[1]) / 2
    assert result.score == pytest.approx(sum(values) / 2 - 2.0 * spread, abs=1e-5)
    assert result.spread == pytest.approx(spread, abs=1e-5)
    assert (result.scorer, result.model, result.revision) == ("careful", "", "")
    assert not result.HasField("raw_score")
    assert result.num_tokens == 2 * len(ROW)
    first, second = result.members
    assert [first.score, second.score] == pytest.approx(values, abs=1e-5)
    assert [first.raw_score, second.raw_score] == pytest.approx([zoo.plain, zoo.scaled], abs=1e-5)
    assert (first.scorer, first.model, first.weight) == ("plain", "plain", 0.5)
    assert (second.revision, second.length_penalty) == (alone.revision, 0.5)
    assert first.revision.startswith("sha256:")
    by_name = {scorer.name: scorer for scorer in listed}
    assert by_name["careful"].kind == reward_pb2.SCORER_KIND_ENSEMBLE
    assert list(by_name["careful"].members) == ["plain", "scaled"]


@pytest.mark.parametrize(
    ("response", "member", "reason"),
    [
        ("raise", "f", "SCORER_FAILED"),
        ("none", "f", "SCORER_FAILED"),
        ("hang", "f", "SCORER_FAILED"),
        ("ok", "nan", "NOT_FINITE"),
        ("a" * LIMIT, "m", "SEQUENCE_TOO_LONG"),
        ("", "m", "INVALID_FIELD"),
    ],
)
async def test_a_member_that_fails_fails_its_item_by_name_and_no_other(zoo, response, member, reason):
    hanging.clear()
    members = ["nan", "f"] if member == "nan" else ["m", "f"]
    async with serving(
        both={"ensemble": members},
        m={"model": zoo.path("plain")},
        nan={"model": zoo.path("nan")},
        f={**FUNCTION, "timeout_seconds": 0.1},
    ) as stub:
        good, failed = await score(stub, text("ok"), text(response), scorer="both")
        hanging.set()
    assert reason_of(failed) == reason
    assert not failed.members
    if response == "":
        assert "items[1].text.response" in failed.status.message
    else:
        assert failed.status.message.startswith(f"member {member}: ")
    if member == "nan":
        assert reason_of(good) == "NOT_FINITE"
    else:
        assert good.HasField("score")


async def test_a_member_may_fail_where_the_settings_say_so_and_the_answer_tells(zoo):
    async with serving(
        both={"ensemble": ["m", "f"], "max_failed_members": 1}, m={"model": zoo.path("plain")}, f=FUNCTION
    ) as stub:
        (result,) = await score(stub, text("none"), scorer="both")
        (alone,) = await score(stub, text("none"), scorer="m")
    assert result.score == alone.score
    failed = {part.scorer: part for part in result.members}["f"]
    assert reason_of(failed) == "SCORER_FAILED"
    assert failed.weight == 0.0


async def test_an_ensemble_streams_and_truncates(zoo):
    async with serving(
        both={"ensemble": ["m", "n"]}, m={"model": zoo.path("plain")}, n={"model": zoo.path("scaled")}
    ) as stub:
        call = stub.StreamScore(timeout=TIMEOUT)
        options = reward_pb2.ScoreOptions(overlength=reward_pb2.OVERLENGTH_TRUNCATE_PROMPT)
        items = [tokens([3] * (LIMIT + 2), id="long"), tokens(id="short")]
        await call.write(reward_pb2.StreamScoreRequest(options=options, items=items))
        await call.done_writing()
        results = {result.id: result async for response in call for result in response.results}
    assert results["long"].truncated
    assert not results["short"].truncated
    assert all(len(result.members) == 2 for result in results.values())


async def test_identical_items_are_scored_once_if_asked_for(zoo):
    metrics = Metrics("reward")
    cached = {"model": zoo.path("scaled"), "cache_items": 100, "length_penalty": {"per_token": 0.5}}
    async with served_with(metrics, m=cached) as stub:
        first = await score(stub, tokens(), tokens([9, 9]), tokens(), include_raw=True)
        again = await score(stub, tokens(num_response=1), include_raw=True)
        both = await asyncio.gather(*(score(stub, tokens([4, 4, 4])) for _ in range(4)))
    sample = metrics.registry.get_sample_value
    counted = {how: sample("steersman_score_cache_items_total", {"model": "m", "how": how}) for how in ("hit", "miss")}
    assert counted["miss"] == 3
    assert counted["hit"] >= 1
    assert first[0].score == first[2].score
    assert again[0].raw_score == first[0].raw_score
    assert again[0].score == pytest.approx(first[0].score + 0.5)
    assert again[0].revision == first[0].revision
    assert len({result.score for (result,) in both}) == 1
    # Warming up ran two rows of the greatest length.
    assert sample("steersman_batched_tokens_total", {"batcher": "m"}) == 2 * LIMIT + len(ROW) + 2 + 3


async def test_half_a_stream_withdraws_its_items_and_harms_nobody(zoo):
    metrics = Metrics("reward")
    hanging.clear()
    async with served_with(metrics, f={**FUNCTION, "timeout_seconds": TIMEOUT}, m={"model": zoo.path("plain")}) as stub:
        call = stub.StreamScore(timeout=TIMEOUT)
        await call.write(reward_pb2.StreamScoreRequest(items=[reward_pb2.ScoreItem(id="x", text=text("hang").text)]))
        async with asyncio.timeout(TIMEOUT):
            while metrics.registry.get_sample_value("steersman_rpc_in_flight", {"method": "StreamScore"}) != 1:
                await asyncio.sleep(0)
        # No end of the stream: the sender is gone.
        call.cancel()
        async with asyncio.timeout(TIMEOUT):
            while metrics.registry.get_sample_value("steersman_rpc_in_flight", {"method": "StreamScore"}) != 0:
                await asyncio.sleep(0)
        hanging.set()
        (result,) = await score(stub, tokens(), scorer="m")
    assert result.HasField("score")
