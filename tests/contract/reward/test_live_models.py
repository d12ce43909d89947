"""Models that come, take over and go while the server serves: tiny real ones, and some that the test holds still."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from steersman.reward.build import build_handler
from steersman.reward.engine import footprint
from steersman.reward.engine.port import Normalization
from steersman.reward.handler import RewardHandler
from steersman.reward.model_manager import ModelManager
from steersman.reward.model_scorer import ModelScorer
from steersman.reward.roster import Roster
from steersman.reward.served_model import ServedModel
from steersman.reward.servicer import RewardService
from steersman.reward.settings import LiveModelsSettings, ModelScorerSettings, RewardSettings
from steersman.serving.batching import BatchingSettings
from steersman.serving.metrics import Metrics
from steersman.serving.server import start_server
from steersman.serving.settings import ServerSettings
from steersman.v1 import (
    reward_model_pb2,
    reward_model_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
    types_pb2,
)
from steersman.wire.identity import ModelInfo

TIMEOUT = 30
ROW = [5, 6, 7]
READY = reward_model_pb2.REWARD_MODEL_STATE_READY
FAILED = reward_model_pb2.REWARD_MODEL_STATE_FAILED
LOADING = reward_model_pb2.REWARD_MODEL_STATE_LOADING


def save_tiny(folder: Path, seed: int, *, vocab_size: int = 40, num_labels: int = 1, broken: bool = False) -> float:
    """Writes a checkpoint; returns its score of ROW."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        initializer_range=0.5,
        num_labels=num_labels,
        pad_token_id=0,
    )
    model = Qwen2ForSequenceClassification(config).eval()
    with torch.no_grad():
        if broken:
            model.model.norm.weight.fill_(float("nan"))
        model.save_pretrained(folder)
        return float(model.score(model.model(input_ids=torch.tensor([ROW])).last_hidden_state[0, -1])[0])


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A folder of checkpoints, good and bad, and the score of ROW by each good one."""
    root = tmp_path_factory.mktemp("models")
    scores = {name: save_tiny(root / name, seed) for seed, name in enumerate(("first", "second", "third"))}
    save_tiny(root / "nan", 3, broken=True)
    save_tiny(root / "two-labels", 4, num_labels=2)
    scores["other-vocabulary"] = save_tiny(root / "other-vocabulary", 5, vocab_size=60)
    save_tiny(root / "torn", 6)
    weights = root / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    save_tiny(root / "pickled", 7)
    (root / "pickled" / "model.safetensors").rename(root / "pickled" / "pytorch_model.bin")
    (root / "empty").mkdir()
    save_tiny(root.parent / "outside", 8)
    (root / "link").symlink_to(root.parent / "outside")
    return root, scores


class Server:
    """A server with its stubs."""

    def __init__(self, channel: grpc.aio.Channel, manager: ModelManager, metrics: Metrics) -> None:
        self.channel = channel
        self.manager = manager
        self.metrics = metrics
        self.scores = reward_pb2_grpc.RewardServiceStub(channel)
        self.models = reward_model_pb2_grpc.RewardModelServiceStub(channel)

    async def score(self, scorer: str = "", row: Sequence[int] = ROW) -> reward_pb2.ItemScore:
        pair = reward_pb2.TokenPair(prompt=types_pb2.TokenIds(ids=row[:-1]), response=types_pb2.TokenIds(ids=row[-1:]))
        options = reward_pb2.ScoreOptions(scorer=scorer)
        request = reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(tokens=pair)], options=options)
        (result,) = (await self.scores.Score(request, timeout=TIMEOUT)).results
        return result

    async def load(self, name: str, source: str, **fields: Any) -> reward_model_pb2.RewardModel:
        request = reward_model_pb2.LoadModelRequest(name=name, source=source, **fields)
        return (await self.models.LoadModel(request, timeout=TIMEOUT)).model

    async def settled(self, name: str) -> reward_model_pb2.RewardModel:
        request = reward_model_pb2.GetModelRequest(name=name, wait=Duration(seconds=TIMEOUT))
        return (await self.models.GetModel(request, timeout=TIMEOUT)).model

    async def switch(self, scorer: str, model: str, **fields: Any) -> reward_model_pb2.SwitchScorerResponse:
        request = reward_model_pb2.SwitchScorerRequest(scorer=scorer, model=model, **fields)
        return await self.models.SwitchScorer(request, timeout=TIMEOUT)

    async def unload(self, name: str) -> reward_model_pb2.RewardModel:
        request = reward_model_pb2.UnloadModelRequest(name=name)
        return (await self.models.UnloadModel(request, timeout=TIMEOUT)).model

    async def listed(self) -> dict[str, reward_model_pb2.RewardModel]:
        response = await self.models.ListModels(reward_model_pb2.ListModelsRequest(), timeout=TIMEOUT)
        return {model.name: model for model in response.models}


@asynccontextmanager
async def serving(handler: RewardHandler, manager: ModelManager, metrics: Metrics) -> AsyncIterator[Server]:
    server = await start_server(RewardService(handler, manager), ServerSettings(), metrics)
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield Server(channel, manager, metrics)
    finally:
        await server.stop()


@asynccontextmanager
async def real(root: Path, *, scorers: dict[str, Any] | None = None, **live: Any) -> AsyncIterator[Server]:
    """A server as its settings make it, with the scorer "helpful" on the model "first"."""
    metrics = Metrics("reward")
    settings = RewardSettings(
        scorers={"helpful": {"model": str(root / "first")}, **(scorers or {})}, models={"roots": [root], **live}
    )
    async with serving(*await build_handler(settings, metrics), metrics) as server:
        yield server


async def refused(call: Any) -> tuple[str, str, str]:
    """Code, reason and message of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    status = rpc_status.from_call(raised.value)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return raised.value.code().name, info.reason, status.message


async def test_a_model_is_loaded_tried_switched_to_and_the_old_one_unloaded(zoo):
    root, expected = zoo
    async with real(root) as server:
        before = await server.score("helpful")
        assert before.score == pytest.approx(expected["first"], abs=1e-5)
        assert before.model == "helpful"
        loading = await server.load("helpful-2", "second", scorer="helpful")
        assert (loading.state, loading.source) == (LOADING, str(root / "second"))
        loaded = await server.settled("helpful-2")
        assert (loaded.state, loaded.error, list(loaded.scorers)) == (READY, "", [])
        assert loaded.parameter_bytes > 0

        assert (await server.score("helpful")).revision == before.revision
        tried = await server.score("helpful-2")
        assert tried.score == pytest.approx(expected["second"], abs=1e-5)
        switched = await server.switch("helpful", "helpful-2")
        assert (switched.previous, switched.model.name) == ("helpful", "helpful-2")
        after = await server.score("helpful")
        assert (after.score, after.revision) == (tried.score, loaded.model.revision)
        assert (after.scorer, after.model) == ("helpful", "helpful-2")
        assert after.revision != before.revision

        models = await server.listed()
        assert {name: list(model.scorers) for name, model in models.items()} == {
            "helpful": [],
            "helpful-2": ["helpful"],
        }
        scorers = await server.scores.ListScorers(reward_pb2.ListScorersRequest(), timeout=TIMEOUT)
        assert [(found.name, found.model.revision) for found in scorers.scorers] == [
            ("helpful", after.revision),
            ("helpful-2", after.revision),
        ]
        await server.unload("helpful")
        assert list(await server.listed()) == ["helpful-2"]
        assert (await server.score()).revision == after.revision


async def test_the_memory_of_an_unloaded_model_is_free(zoo):
    root, _ = zoo
    async with real(root) as server:
        await server.load("b", "second")
        await server.settled("b")
        assert (await server.score("b")).HasField("score")
        gc.collect()
        living = [weakref.ref(found) for found in gc.get_objects() if isinstance(found, Qwen2ForSequenceClassification)]
        await server.unload("b")
        assert sum(reference() is not None for reference in living) == len(living) - 1
        code, reason, _ = await refused(server.score("b"))
        assert (code, reason) == ("NOT_FOUND", "NOT_FOUND")
        sample = server.metrics.registry.get_sample_value
        assert sample("steersman_model_loads_total", {"outcome": "ready"}) == 1
        assert sample("steersman_queue_depth", {"batcher": "b"}) is None
        assert sample("steersman_queue_depth", {"batcher": "helpful"}) == 0


async def test_calls_during_changes_are_all_answered_by_the_model_they_name(zoo):
    """Callers never stop; models come and go beneath them."""
    root, expected = zoo
    names = ["second", "third", "first"]
    async with real(
        root, scorers={"both": {"ensemble": ["helpful", "fixed"]}, "fixed": {"model": str(root / "third")}}
    ) as server:
        values = {}
        results: list[reward_pb2.ItemScore] = []
        stop = asyncio.Event()

        async def call(scorer: str) -> None:
            while not stop.is_set():
                results.append(await server.score(scorer))

        async def stream() -> None:
            sending = server.scores.StreamScore(timeout=TIMEOUT)
            pair = reward_pb2.TokenPair(response=types_pb2.TokenIds(ids=ROW))
            number = 0
            while not stop.is_set():
                number += 1
                item = reward_pb2.ScoreItem(tokens=pair, id=str(number))
                await sending.write(reward_pb2.StreamScoreRequest(items=[item]))
                response = await sending.read()
                results.extend(response.results)
            await sending.done_writing()

        async with asyncio.TaskGroup() as group:
            for scorer in ("helpful", "helpful", "both"):
                group.create_task(call(scorer))
            group.create_task(stream())
            values[(await server.score("helpful")).revision] = expected["first"]
            for number, name in enumerate(names):
                await server.load(f"m{number}", name, scorer="helpful", switch_when_ready=True, unload_previous=True)
                model = await server.settled(f"m{number}")
                assert (model.state, list(model.scorers)) == (READY, ["helpful"])
                values[model.model.revision] = expected[name]
                assert (await server.score("helpful")).revision == model.model.revision
            stop.set()
    assert len(results) > 10
    single = [result for result in results if result.scorer == "helpful"]
    for result in single:
        assert result.score == pytest.approx(values[result.revision], abs=1e-5)
    for result in results:
        assert result.status.code == 0
        for member in result.members:
            assert member.score == pytest.approx(values.get(member.revision, expected["third"]), abs=1e-5)


@pytest.mark.parametrize(
    ("source", "code", "reason", "message"),
    [
        ("../outside", "PERMISSION_DENIED", "PERMISSION_DENIED", "a folder below models.roots"),
        ("link", "PERMISSION_DENIED", "PERMISSION_DENIED", "a folder below models.roots"),
        ("/etc", "PERMISSION_DENIED", "PERMISSION_DENIED", "a folder below models.roots"),
        (".", "PERMISSION_DENIED", "PERMISSION_DENIED", "a folder below models.roots"),
        ("", "PERMISSION_DENIED", "PERMISSION_DENIED", "a folder below models.roots"),
        ("missing", "INVALID_ARGUMENT", "INVALID_FIELD", "a folder with config.json and safetensors"),
        ("empty", "INVALID_ARGUMENT", "INVALID_FIELD", "a folder with config.json and safetensors"),
        ("pickled", "INVALID_ARGUMENT", "INVALID_FIELD", "a folder with config.json and safetensors"),
    ],
)
async def test_a_source_that_is_not_allowed_or_no_model_is_refused_at_once(zoo, source, code, reason, message):
    root, expected = zoo
    async with real(root) as server:
        found = await refused(server.load("b", source))
        assert found[:2] == (code, reason)
        assert message in found[2]
        assert list(await server.listed()) == ["helpful"]
        assert (await server.score()).score == pytest.approx(expected["first"], abs=1e-5)


async def test_without_roots_nothing_can_be_loaded(zoo):
    root, _ = zoo
    async with real(root, roots=[]) as server:
        code, reason, message = await refused(server.load("b", str(root / "second")))
    assert (code, reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    assert "models.roots and models.hub_ids are empty" in message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nan", "gives scores that are not finite"),
        ("two-labels", "has 2 labels, allowed: a sequence classifier with 1 label"),
        ("torn", "loading failed with SafetensorError; the server's log says why"),
    ],
)
async def test_a_model_that_cannot_serve_fails_to_load_and_the_old_one_serves_on(zoo, source, message):
    root, expected = zoo
    async with real(root) as server:
        await server.load("bad", source, scorer="helpful", switch_when_ready=True, unload_previous=True)
        failed = await server.settled("bad")
        assert failed.state == FAILED
        assert message in failed.error
        assert not failed.HasField("model")
        after = await server.score("helpful")
        assert after.score == pytest.approx(expected["first"], abs=1e-5)
        assert (await refused(server.switch("helpful", "bad")))[1] == "MODEL_STATE"
        assert (await refused(server.score("bad")))[1] == "NOT_FOUND"
        # The name is free for another try, or can be forgotten.
        await server.load("bad", "second")
        assert (await server.settled("bad")).state == READY
        await server.unload("bad")


async def test_a_model_larger_than_the_free_memory_is_not_loaded(zoo, monkeypatch):
    root, _ = zoo
    async with real(root) as server:
        monkeypatch.setattr(footprint, "free_bytes", lambda device: 1000)
        await server.load("b", "second")
        failed = await server.settled("b")
        assert failed.state == FAILED
        assert "GiB that are free on cpu" in failed.error
        await server.unload("b")
        assert list(await server.listed()) == ["helpful"]


async def test_names_and_numbers_are_bounded(zoo):
    root, _ = zoo
    async with real(root, scorers={"length": {"function": "builtins:len"}}, max_models=2) as server:
        assert (await refused(server.load("no/name", "second")))[1] == "INVALID_FIELD"
        for taken in ("helpful", "length"):
            assert (await refused(server.load(taken, "second")))[1] == "ALREADY_EXISTS"
        assert (await refused(server.load("b", "second", revision="main")))[1] == "INVALID_FIELD"
        assert (await refused(server.load("b", "second", scorer="nobody")))[1] == "NOT_FOUND"
        assert (await refused(server.load("b", "second", scorer="length")))[1] == "INVALID_FIELD"
        assert (await refused(server.load("b", "second", switch_when_ready=True)))[1] == "INVALID_FIELD"
        await server.load("b", "second")
        code, reason, message = await refused(server.load("c", "third"))
        assert (code, reason) == ("FAILED_PRECONDITION", "MODEL_STATE")
        assert "2 models are held (b, helpful), allowed: 2; unload one first" in message
        await server.settled("b")
        await server.unload("b")
        await server.load("c", "third")
        await server.settled("c")


async def test_what_a_scorer_points_to_is_not_unloaded(zoo):
    root, _ = zoo
    async with real(root) as server:
        code, reason, message = await refused(server.unload("helpful"))
        assert (code, reason) == ("FAILED_PRECONDITION", "MODEL_STATE")
        assert "scorer helpful points to model helpful" in message
        for call in (
            server.unload("x"),
            server.settled("x"),
            server.switch("helpful", "x"),
            server.switch("x", "helpful"),
        ):
            assert (await refused(call))[1] == "NOT_FOUND"
        request = reward_model_pb2.GetModelRequest(name="helpful", wait=Duration(seconds=3601))
        assert (await refused(server.models.GetModel(request, timeout=TIMEOUT)))[1] == "INVALID_FIELD"


async def test_a_switch_to_another_tokenizer_has_to_be_asked_for(zoo):
    root, expected = zoo
    async with real(root) as server:
        await server.load("b", "other-vocabulary", scorer="helpful", switch_when_ready=True)
        model = await server.settled("b")
        assert model.state == READY
        assert "scorer helpful was not switched to it: model b has another tokenizer than helpful" in model.error
        assert (await server.score("helpful")).score == pytest.approx(expected["first"], abs=1e-5)
        assert (await refused(server.switch("helpful", "b")))[1] == "MODEL_STATE"
        await server.switch("helpful", "b", allow_other_tokenizer=True)
        assert (await server.score("helpful")).score == pytest.approx(expected["other-vocabulary"], abs=1e-5)


async def test_a_model_is_loaded_with_the_settings_of_the_scorer_it_is_for(zoo):
    root, expected = zoo
    penalised = {"model": str(root / "first"), "length_penalty": {"per_token": 0.5}, "max_sequence_tokens": 4}
    async with real(root, scorers={"short": penalised}) as server:
        await server.load("b", "second", scorer="short")
        await server.settled("b")
        result = await server.score("b")
        assert result.score == pytest.approx(expected["second"] - 0.5, abs=1e-5)
        assert result.length_penalty == 0.5
        assert (await server.listed())["b"].model.max_sequence_tokens == 4


async def test_a_checkpoint_that_is_written_over_does_not_change_what_is_served(zoo, tmp_path):
    expected = save_tiny(tmp_path / "m", 9)
    async with real(zoo[0], scorers={"m": {"model": str(tmp_path / "m")}}) as server:
        before = await server.score("m")
        weights = tmp_path / "m" / "model.safetensors"
        with weights.open("r+b") as file:
            file.seek(-1000, 2)
            file.write(bytes(1000))
        after = await server.score("m")
    assert before.score == pytest.approx(expected, abs=1e-5)
    assert (after.score, after.revision) == (before.score, before.revision)


async def test_the_service_is_found_by_reflection(zoo):
    root, _ = zoo
    async with real(root) as server:
        stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for response in stub.ServerReflectionInfo(iter([request]), timeout=TIMEOUT):
            names = {service.name for service in response.list_services_response.service}
            break
    assert {"steersman.v1.RewardService", "steersman.v1.RewardModelService"} <= names


class GatedEngine:
    """Gives its own number, when the test lets it."""

    normalization = Normalization()
    shares_prefixes = False
    num_workers = 1

    def __init__(self, value: float, revision: str) -> None:
        self.model = ModelInfo(name="tiny", revision=revision, vocab_size=40, max_sequence_tokens=16)
        self.value = value
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.num_scored = 0

    def close(self) -> None:
        pass

    def score(self, rows: Sequence[np.ndarray]) -> list[float]:
        self.entered.release()
        assert self.gate.wait(TIMEOUT)
        self.num_scored += len(rows)
        return [self.value] * len(rows)

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=TIMEOUT)


class HeldBuilder:
    """Builds models of the engines it is given, when the test lets it."""

    def __init__(self, **engines: GatedEngine) -> None:
        self.engines = engines
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_building = 0
        self.most_building = 0
        self.released: list[str] = []

    async def build(self, name: str, settings: ModelScorerSettings, *, reserve: float) -> ModelScorer:
        self.num_building += 1
        self.most_building = max(self.most_building, self.num_building)
        try:
            await self.gate.wait()
        finally:
            self.num_building -= 1
        if name not in self.engines:
            raise RuntimeError("private text of a library")
        return ModelScorer(name, self.engines[name], BatchingSettings())

    def release(self, name: str) -> None:
        self.released.append(name)


@asynccontextmanager
async def held(root: Path, builder: HeldBuilder, **live: Any) -> AsyncIterator[Server]:
    """A server whose scorer "s" is on the engine "old"."""
    roster, settings = Roster(), ModelScorerSettings(model="m")
    model = ServedModel("old", settings, ModelScorer("old", builder.engines["old"], BatchingSettings()))
    roster.models["old"] = model
    roster.point("s", model)
    metrics = Metrics("reward")
    manager = ModelManager(roster, builder, LiveModelsSettings(roots=[root], **live), metrics)
    handler = RewardHandler(roster, "s", watched=roster.in_service)
    try:
        async with serving(handler, manager, metrics) as server:
            yield server
    finally:
        for engine in builder.engines.values():
            engine.gate.set()


async def test_items_in_flight_finish_on_the_old_model_and_say_so(zoo):
    root, _ = zoo
    old, new = GatedEngine(1.0, "r-old"), GatedEngine(2.0, "r-new")
    new.gate.set()
    builder = HeldBuilder(old=old, new=new)
    async with held(root, builder) as server:
        before = asyncio.create_task(server.score("s"))
        await old.wait_entered()
        await server.load("new", "second", scorer="s", switch_when_ready=True)
        assert list((await server.settled("new")).scorers) == ["s"]
        after = await server.score("s")
        assert (after.score, after.revision, after.model) == (2.0, "r-new", "new")
        unload = asyncio.create_task(server.unload("old"))
        async with asyncio.timeout(TIMEOUT):
            while (await server.listed())["old"].state != reward_model_pb2.REWARD_MODEL_STATE_UNLOADING:
                pass
        assert (await server.listed())["old"].num_items_in_flight == 1
        assert not builder.released
        assert (await refused(server.switch("s", "old")))[1] == "MODEL_STATE"
        old.gate.set()
        first = await before
        assert (first.score, first.revision, first.model) == (1.0, "r-old", "old")
        await unload
        assert builder.released == ["old"]
        assert list(await server.listed()) == ["new"]


async def test_an_unload_goes_on_without_its_caller_and_ends_what_hangs(zoo):
    root, _ = zoo
    old, new = GatedEngine(1.0, "r-old"), GatedEngine(2.0, "r-new")
    new.gate.set()
    builder = HeldBuilder(old=old, new=new)
    async with held(root, builder, drain_seconds=0.05) as server:
        await server.load("new", "second", scorer="s", switch_when_ready=True)
        await server.settled("new")
        running = asyncio.create_task(server.score("old"))
        await old.wait_entered()
        waiting = asyncio.create_task(server.score("old"))
        async with asyncio.timeout(TIMEOUT):
            while (await server.listed())["old"].num_items_in_flight != 2:
                pass
        impatient = server.models.UnloadModel(reward_model_pb2.UnloadModelRequest(name="old"), timeout=TIMEOUT)
        async with asyncio.timeout(TIMEOUT):
            while (await server.listed())["old"].state != reward_model_pb2.REWARD_MODEL_STATE_UNLOADING:
                pass
        impatient.cancel()
        old.gate.set()
        assert (await refused(server.settled("old")))[1] == "NOT_FOUND"
        assert builder.released == ["old"]
        for task in (running, waiting):
            result = await task
            assert result.HasField("score") or result.status.code == grpc.StatusCode.UNAVAILABLE.value[0]


async def test_one_model_loads_at_a_time_and_what_a_library_says_stays_private(zoo):
    root, _ = zoo
    builder = HeldBuilder(old=GatedEngine(1.0, "r"), good=GatedEngine(2.0, "r2"))
    builder.gate.clear()
    async with held(root, builder) as server:
        await server.load("good", "second")
        await server.load("bad", "third")
        listed = await server.listed()
        assert [listed[name].state for name in ("good", "bad")] == [LOADING, LOADING]
        assert (await refused(server.unload("good")))[1] == "MODEL_STATE"
        assert (await refused(server.switch("s", "good")))[1] == "MODEL_STATE"
        request = reward_model_pb2.GetModelRequest(name="good", wait=Duration(nanos=1))
        assert (await server.models.GetModel(request, timeout=TIMEOUT)).model.state == LOADING
        builder.gate.set()
        assert (await server.settled("good")).state == READY
        failed = await server.settled("bad")
        assert failed.state == FAILED
        assert "RuntimeError; the server's log says why" in failed.error
        assert "private" not in failed.error
    assert builder.most_building == 1


async def test_a_load_that_takes_too_long_fails(zoo):
    root, _ = zoo
    builder = HeldBuilder(old=GatedEngine(1.0, "r"))
    builder.gate.clear()
    async with held(root, builder, load_seconds=0.01) as server:
        await server.load("late", "second")
        failed = await server.settled("late")
    assert (failed.state, failed.error) == (FAILED, "it was not loaded within 0.01 s")


async def test_a_server_stops_while_a_model_loads(zoo):
    root, _ = zoo
    builder = HeldBuilder(old=GatedEngine(1.0, "r"))
    builder.gate.clear()
    async with asyncio.timeout(TIMEOUT):
        async with held(root, builder) as server:
            await server.load("late", "second")
    assert builder.num_building == 0
