"""Tiny real models, functions and an engine that waits, behind a real grpc.aio server."""

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import grpc
import numpy as np
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

from steersman.reward.engine.port import Normalization
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


def grade(items: Sequence[ScorerInput]) -> list[float | None]:
    """Scores by the word that the response is."""
    words = [item.response for item in items]
    if "raise" in words:
        raise RuntimeError("as told")
    special: dict[str, float | None] = {"none": None, "nan": float("nan")}
    return [special.get(word, float(len(word))) for word in words]


class GatedEngine:
    """Scores 0 when the test lets it."""

    model = INFO
    normalization = Normalization()
    shares_prefixes = False
    num_workers = 1

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
