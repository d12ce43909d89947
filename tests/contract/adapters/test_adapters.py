"""Adapters against a real server: what they send, and what becomes of an item that failed."""

import asyncio
import pickle
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.json_format import MessageToDict

from steersman.adapters import verl
from steersman.adapters.trl import SteersmanReward
from steersman.client import SteersmanError
from steersman.v1 import reward_pb2, reward_pb2_grpc
from steersman.wire.errors import Reason
from steersman.wire.status import status_to_proto


class Servicer(reward_pb2_grpc.RewardServiceServicer):
    """The score is the length of the response; a response "bad" fails."""

    def __init__(self) -> None:
        self.requests: list[reward_pb2.ScoreRequest] = []

    async def Score(self, request, context):
        self.requests.append(request)
        return reward_pb2.ScoreResponse(results=[self._score(item) for item in request.items])

    def _score(self, item: reward_pb2.ScoreItem) -> reward_pb2.ItemScore:
        text = item.chat.response.content if item.HasField("chat") else item.text.response
        if text == "bad":
            error = SteersmanError(Reason.SCORER_FAILED, "told to fail")
            return reward_pb2.ItemScore(id=item.id, status=status_to_proto(error))
        return reward_pb2.ItemScore(id=item.id, status=status_to_proto(None), score=len(text))


@pytest.fixture
async def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
async def address(servicer: Servicer) -> AsyncIterator[str]:
    server = grpc.aio.server()
    reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def test_trl_text(address: str, servicer: Servicer) -> None:
    reward = SteersmanReward(address, scorer="quality", columns=["answer"])
    rewards = await asyncio.to_thread(
        reward,
        prompts=["a", "b"],
        completions=["xyz", "bad"],
        completion_ids=[[1], [2]],
        trainer_state=object(),
        answer=["1", "2"],
    )
    reward.close()
    assert rewards == [3.0, None]
    assert servicer.requests[0].options.scorer == "quality"
    assert [MessageToDict(item.context) for item in servicer.requests[0].items] == [{"answer": "1"}, {"answer": "2"}]


async def test_trl_conversations(address: str, servicer: Servicer) -> None:
    reward = SteersmanReward(address)
    prompt = [{"role": "user", "content": "hi"}]
    completion = [{"role": "assistant", "content": "hello"}]
    assert await asyncio.to_thread(reward, prompts=[prompt], completions=[completion]) == [5.0]
    reward.close()
    chat = servicer.requests[0].items[0].chat
    assert [turn.content for turn in chat.prompt.messages] == ["hi"]
    assert chat.response.role == "assistant"


async def test_trl_callable_survives_pickling_after_a_call(address: str) -> None:
    reward = SteersmanReward(address)
    await asyncio.to_thread(reward, prompts=["a"], completions=["b"])
    copy = pickle.loads(pickle.dumps(reward))  # noqa: S301
    reward.close()
    assert await asyncio.to_thread(copy, prompts=["a"], completions=["bcd"]) == [3.0]
    copy.close()


def test_trl_names_a_column_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"columns is \['answer'\], allowed: columns of the data set \(topic\)"):
        SteersmanReward("127.0.0.1:1", columns=["answer"])(prompts=["a"], completions=["b"], topic=["t"])


async def test_verl(address: str, servicer: Servicer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSMAN_REWARD", address)
    extra = {"question": "q", "split": "train"}
    assert await asyncio.to_thread(verl.compute_score, "gsm8k", "four", "4", extra) == 4.0
    scores = await asyncio.gather(*(verl.compute_score_async("gsm8k", "x" * n, "4") for n in (1, 2, 3)))
    assert scores == [1.0, 2.0, 3.0]
    item = servicer.requests[0].items[0]
    assert item.text.prompt == "q"
    assert MessageToDict(item.context) == {
        "data_source": "gsm8k", "ground_truth": "4", "extra_info": {"split": "train"}
    }  # fmt: skip


async def test_verl_raises_rather_than_inventing_a_score(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSMAN_REWARD", address)
    with pytest.raises(SteersmanError, match="told to fail"):
        await verl.compute_score_async("gsm8k", "bad", "4")
