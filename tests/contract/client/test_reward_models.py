"""The clients and commands of the models of a reward server, against a fake that loads as it is told."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from steersman.cli.main import app
from steersman.client import (
    AsyncRewardModelClient,
    Reason,
    RewardClient,
    RewardModelClient,
    RewardModelState,
    SteersmanError,
)
from steersman.v1 import reward_model_pb2, reward_model_pb2_grpc, reward_pb2, reward_pb2_grpc, types_pb2
from steersman.wire.errors import not_found
from steersman.wire.status import status_to_proto

ADD = reward_model_pb2_grpc.add_RewardModelServiceServicer_to_server


class FakeModels(reward_model_pb2_grpc.RewardModelServiceServicer):
    """A source "bad" fails to load, "endless" loads for ever, others at the second question."""

    def __init__(self, refuse: Any) -> None:
        self.refuse = refuse
        self.models: dict[str, reward_model_pb2.RewardModel] = {}
        self.loads: list[reward_model_pb2.LoadModelRequest] = []
        self.waits: list[float] = []
        self.unloaded: list[str] = []

    async def LoadModel(self, request: Any, context: Any) -> reward_model_pb2.LoadModelResponse:
        if request.source.startswith("/etc"):
            await self.refuse(context, SteersmanError(Reason.PERMISSION_DENIED, "source is not allowed"))
        self.loads.append(request)
        state = reward_model_pb2.REWARD_MODEL_STATE_LOADING
        self.models[request.name] = reward_model_pb2.RewardModel(name=request.name, source=request.source, state=state)
        return reward_model_pb2.LoadModelResponse(model=self.models[request.name])

    async def GetModel(self, request: Any, context: Any) -> reward_model_pb2.GetModelResponse:
        if request.name not in self.models:
            await self.refuse(context, not_found("model", request.name))
        model = self.models[request.name]
        if request.HasField("wait"):
            self.waits.append(request.wait.ToTimedelta().total_seconds())
            if len(self.waits) > 1 and model.source != "endless":
                self.finish(model)
        return reward_model_pb2.GetModelResponse(model=model)

    def finish(self, model: reward_model_pb2.RewardModel) -> None:
        if model.source == "bad":
            model.state, model.error = reward_model_pb2.REWARD_MODEL_STATE_FAILED, "it has 2 labels"
            return
        model.state = reward_model_pb2.REWARD_MODEL_STATE_READY
        model.model.CopyFrom(types_pb2.ModelInfo(name="m", revision="r2", dtype=types_pb2.DATA_TYPE_FLOAT32))
        model.parameter_bytes = 3_000_000
        request = self.loads[-1]
        if request.switch_when_ready and model.source == "foreign":
            model.error = "scorer s was not switched to it: another tokenizer"
        elif request.switch_when_ready:
            model.scorers.append(request.scorer)

    async def ListModels(self, request: Any, context: Any) -> reward_model_pb2.ListModelsResponse:
        return reward_model_pb2.ListModelsResponse(models=self.models.values())

    async def SwitchScorer(self, request: Any, context: Any) -> reward_model_pb2.SwitchScorerResponse:
        if request.model not in self.models:
            await self.refuse(context, not_found("model", request.model))
        return reward_model_pb2.SwitchScorerResponse(model=self.models[request.model], previous="before")

    async def UnloadModel(self, request: Any, context: Any) -> reward_model_pb2.UnloadModelResponse:
        self.unloaded.append(request.name)
        return reward_model_pb2.UnloadModelResponse(model=self.models.pop(request.name))


@pytest.fixture
def fake(refuse: Any) -> FakeModels:
    return FakeModels(refuse)


async def test_a_load_is_waited_for_and_tells_what_came_of_it(fake: FakeModels, serve: Any) -> None:
    async with AsyncRewardModelClient(await serve(ADD, fake)) as client:
        model = await client.load("b", "folder", scorer="s", switch=True, unload_previous=True)
        assert (model.state, model.scorers, model.error) == (RewardModelState.READY, ("s",), "")
        assert model.model is not None
        assert model.model.revision == "r2"
        assert fake.waits == [20.0, 20.0]
        request = fake.loads[0]
        assert (request.scorer, request.switch_when_ready, request.unload_previous) == ("s", True, True)
        assert [found.name for found in await client.list()] == ["b"]
        switched = await client.switch("s", "b")
        assert (switched.model.name, switched.previous) == ("b", "before")
        await client.unload("b")
        assert fake.unloaded == ["b"]


@pytest.mark.parametrize(
    ("source", "reason", "message"),
    [
        ("bad", Reason.MODEL_STATE, "model b is failed: it has 2 labels"),
        ("foreign", Reason.MODEL_STATE, "model b is ready, but scorer s was not switched to it"),
        ("/etc/passwd", Reason.PERMISSION_DENIED, "source is not allowed"),
    ],
)
async def test_a_load_that_fails_is_an_error(
    fake: FakeModels, serve: Any, source: str, reason: Reason, message: str
) -> None:
    address = await serve(ADD, fake)
    async with AsyncRewardModelClient(address) as client:
        with pytest.raises(SteersmanError, match=message) as raised:
            await client.load("b", source, scorer="s", switch=True)
        assert raised.value.reason is reason


async def test_a_load_that_outlasts_its_time_goes_on_at_the_server(fake: FakeModels, serve: Any) -> None:
    async with AsyncRewardModelClient(await serve(ADD, fake)) as client:
        with pytest.raises(SteersmanError) as raised:
            await client.load("b", "endless", timeout=0.2)
        assert raised.value.code.name == "DEADLINE_EXCEEDED"
        assert (await client.get("b")).state is RewardModelState.LOADING
        at_once = await client.load("c", "endless", wait=False)
        assert at_once.state is RewardModelState.LOADING


async def test_the_blocking_client_does_the_same(fake: FakeModels, serve: Any) -> None:
    address = await serve(ADD, fake)

    def talk() -> None:
        with RewardModelClient(address) as client:
            assert client.load("b", "folder").state is RewardModelState.READY
            assert [model.name for model in client.list()] == ["b"]
            assert client.get("b").parameter_bytes == 3_000_000
            assert client.switch("s", "b").previous == "before"
            client.unload("b")
            with pytest.raises(SteersmanError, match="no model is called 'b'"):
                client.get("b")
            with pytest.raises(SteersmanError, match="it has 2 labels"):
                client.load("c", "bad")

    await asyncio.to_thread(talk)


class FakeReward(reward_pb2_grpc.RewardServiceServicer):
    """The raw score is the length of the response; "bad" has none."""

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        results = []
        for item in request.items:
            size = len(item.text.response)
            if item.text.response == "bad":
                error = SteersmanError(Reason.NOT_FINITE, "gave nan")
                results.append(reward_pb2.ItemScore(status=status_to_proto(error)))
                continue
            member = reward_pb2.MemberScore(
                scorer="a",
                status=status_to_proto(None),
                score=size,
                weight=1.0,
                model="m1",
                revision="r1",
                raw_score=2.0,
                length_penalty=0.5,
            )
            raw = None if request.options.scorer == "ensemble" else size
            results.append(
                reward_pb2.ItemScore(
                    status=status_to_proto(None),
                    score=10 * size,
                    raw_score=raw,
                    model="m1",
                    revision="r1",
                    length_penalty=0.25,
                    members=[member],
                )
            )
        return reward_pb2.ScoreResponse(results=results)


async def test_who_gave_a_score_and_what_was_subtracted_is_told(serve: Any) -> None:
    address = await serve(reward_pb2_grpc.add_RewardServiceServicer_to_server, FakeReward())

    def ask() -> Any:
        with RewardClient(address) as client:
            return client.score(prompt="p", responses=["abc"])[0]

    score = await asyncio.to_thread(ask)
    assert (score.model, score.revision, score.length_penalty) == ("m1", "r1", 0.25)
    (member,) = score.members
    assert (member.model, member.revision, member.raw, member.length_penalty) == ("m1", "r1", 2.0, 0.5)


@pytest.fixture
async def steersman(serve: Any, fake: FakeModels) -> Callable[..., Any]:
    def add(servicers: tuple[Any, Any], server: Any) -> None:
        ADD(servicers[0], server)
        reward_pb2_grpc.add_RewardServiceServicer_to_server(servicers[1], server)

    address = await serve(add, (fake, FakeReward()))

    async def run(*arguments: str) -> Result:
        environment = {"STEERSMAN_REWARD_ADDRESS": address, "COLUMNS": "200"}
        return await asyncio.to_thread(CliRunner().invoke, app, list(arguments), None, environment)

    return run


async def test_the_commands_load_switch_list_and_unload(steersman: Any, fake: FakeModels) -> None:
    loaded = await steersman("rewards", "load", "b", "folder", "--scorer", "s", "--switch", "--unload-previous")
    assert (loaded.exit_code, loaded.stdout) == (0, "b is ready, and scorer s points to it\n")
    table = await steersman("rewards", "list")
    assert table.stdout.split("\n")[1].split()[1:6] == ["b", "ready", "s", "r2", "3.0"]
    (row,) = json.loads((await steersman("rewards", "list", "--json")).stdout)
    assert (row["name"], row["state"], row["scorers"], row["revision"]) == ("b", "ready", ["s"], "r2")
    switched = await steersman("rewards", "switch", "s", "b")
    assert switched.stdout == "s points to b, before to before\n"
    assert (await steersman("rewards", "switch", "s", "x")).exit_code == 1
    assert (await steersman("rewards", "unload", "b")).stdout == "b is unloaded\n"
    assert fake.unloaded == ["b"]
    failed = await steersman("rewards", "load", "c", "bad")
    assert failed.exit_code == 1
    assert "it has 2 labels" in failed.stderr
    started = await steersman("rewards", "load", "d", "endless", "--no-wait")
    assert started.stdout == "d is loading\n"


async def test_normalize_writes_the_scale_of_a_reference_set(steersman: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "reward_normalization.json"
    responses = ["a", "abc", "abcde"]
    source.write_text("".join(json.dumps({"prompt": "p", "response": found}) + "\n" for found in responses))
    result = await steersman("rewards", "normalize", str(source), "-o", str(target), "--reference", "held-out ones")
    assert result.exit_code == 0, result.output
    values = json.loads(target.read_text())
    assert values == {
        "version": 1,
        "mean": 3.0,
        "std": pytest.approx((8 / 3) ** 0.5),
        "num_responses": 3,
        "reference": "held-out ones",
        "scored_by": "r1",
    }
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize(
    ("responses", "flags", "message"),
    [
        (["a", "bad"], (), "row 2 has no score: NOT_FINITE: gave nan"),
        (["a", "b"], (), "all the same, give no scale"),
        (["a"], (), "all the same, give no scale"),
        ([], (), "give no scale"),
        (["a", "bc"], ("--scorer", "ensemble"), "allowed: one model or function"),
    ],
)
async def test_normalize_refuses_what_gives_no_scale(
    steersman: Any, tmp_path: Path, responses: list[str], flags: tuple[str, ...], message: str
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.json"
    source.write_text("".join(json.dumps({"prompt": "p", "response": found}) + "\n" for found in responses))
    result = await steersman("rewards", "normalize", str(source), "-o", str(target), *flags)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not target.exists()
