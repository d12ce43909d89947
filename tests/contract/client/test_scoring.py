"""The reward and reference clients against servers: order, splitting, bounded concurrency, per-item errors."""

import asyncio
from typing import Any

import numpy as np
import pytest

from steersman.client import (
    AsyncReferenceClient,
    AsyncRewardClient,
    ChatMessage,
    Overlength,
    ReferenceClient,
    RewardClient,
    ScoreItem,
    ScorerKind,
)
from steersman.client.splitting import MAX_PART_ITEMS, MAX_PARTS_IN_FLIGHT
from steersman.v1 import reference_pb2, reference_pb2_grpc, reward_pb2, reward_pb2_grpc, types_pb2
from steersman.wire.errors import Code, Reason, SteersmanError, not_found, queue_full
from steersman.wire.status import status_to_proto
from steersman.wire.tensors import from_ragged, from_tensor, to_ragged

ADD_REWARD = reward_pb2_grpc.add_RewardServiceServicer_to_server
ADD_REFERENCE = reference_pb2_grpc.add_ReferenceServiceServicer_to_server


class FakeReward(reward_pb2_grpc.RewardServiceServicer):
    """Scores an item by the length of its response; an item called "bad" fails. A gate holds calls while it is shut."""

    def __init__(self, refuse: Any) -> None:
        self.refuse = refuse
        self.requests: list[reward_pb2.ScoreRequest] = []
        self.errors: list[SteersmanError] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.running = 0
        self.most_running = 0
        self.stream_options: list[str] = []

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        self.requests.append(request)
        if self.errors:
            await self.refuse(context, self.errors.pop(0))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await self.gate.wait()
        self.running -= 1
        return reward_pb2.ScoreResponse(results=[self.result(item) for item in request.items])

    async def StreamScore(self, requests: Any, context: Any) -> Any:
        waiting: list[reward_pb2.ScoreItem] = []
        async for request in requests:
            if request.HasField("options"):
                self.stream_options.append(request.options.scorer)
            if self.errors:
                await self.refuse(context, self.errors.pop(0))
            waiting.extend(request.items)
            if len(waiting) == 2:
                yield reward_pb2.StreamScoreResponse(results=[self.result(item) for item in reversed(waiting)])
                waiting.clear()

    def result(self, item: reward_pb2.ScoreItem) -> reward_pb2.ItemScore:
        if item.id == "bad":
            error = SteersmanError(Reason.SEQUENCE_TOO_LONG, "9 tokens, allowed: 8")
            return reward_pb2.ItemScore(id=item.id, status=status_to_proto(error))
        size = len(item.tokens.response.ids) if item.HasField("tokens") else len(item.text.response)
        return reward_pb2.ItemScore(id=item.id, status=status_to_proto(None), score=size, scorer="length", num_tokens=3)

    async def ListScorers(self, request: Any, context: Any) -> reward_pb2.ListScorersResponse:
        scorer = reward_pb2.Scorer(name="length", kind=reward_pb2.SCORER_KIND_FUNCTION, is_default=True)
        return reward_pb2.ListScorersResponse(scorers=[scorer])


@pytest.fixture
def fake(refuse: Any) -> FakeReward:
    return FakeReward(refuse)


async def test_scores_keep_the_order_and_errors_stay_with_their_items(fake: FakeReward, serve: Any) -> None:
    items = [ScoreItem(prompt="p", response="abc", id="good"), ScoreItem(prompt="p", response="x", id="bad")]
    async with AsyncRewardClient(await serve(ADD_REWARD, fake)) as client:
        good, bad = await client.score(items, scorer="length", overlength=Overlength.TRUNCATE_PROMPT)
    assert (good.value, good.error, good.scorer, good.num_tokens) == (3.0, None, "length", 3)
    assert good.unwrap() == 3.0
    assert bad.value is None
    assert bad.error is not None
    assert bad.error.reason is Reason.SEQUENCE_TOO_LONG
    with pytest.raises(SteersmanError, match="9 tokens"):
        bad.unwrap()
    assert fake.requests[0].options.scorer == "length"
    assert fake.requests[0].options.overlength == reward_pb2.OVERLENGTH_TRUNCATE_PROMPT


async def test_one_prompt_with_several_responses(fake: FakeReward, serve: Any) -> None:
    async with AsyncRewardClient(await serve(ADD_REWARD, fake)) as client:
        scores = await client.score(prompt=[1, 2], responses=[[3], np.array([4, 5], np.int32)])
        assert [score.unwrap() for score in scores] == [1.0, 2.0]
        assert await client.score([]) == []
    chat = [{"role": "user", "content": "hi"}]
    async with AsyncRewardClient(await serve(ADD_REWARD, fake)) as client:
        await client.score(prompt=chat, responses=["hello", ChatMessage(role="bot", content="hey")])
    sent = [item.chat for item in fake.requests[-1].items]
    assert [(pair.response.role, pair.response.content) for pair in sent] == [("assistant", "hello"), ("bot", "hey")]


async def test_large_batches_are_split_and_at_most_eight_calls_run_at_once(fake: FakeReward, serve: Any) -> None:
    count = MAX_PART_ITEMS * (MAX_PARTS_IN_FLIGHT + 4) + 1
    items = [ScoreItem(prompt="", response="r" * (index % 5 + 1)) for index in range(count)]
    fake.gate.clear()
    async with AsyncRewardClient(await serve(ADD_REWARD, fake)) as client, asyncio.timeout(60):
        task = asyncio.create_task(client.score(items))
        while fake.running < MAX_PARTS_IN_FLIGHT:
            await asyncio.sleep(0)
        fake.gate.set()
        scores = await task
    assert [score.unwrap() for score in scores] == [index % 5 + 1 for index in range(count)]
    assert fake.most_running == MAX_PARTS_IN_FLIGHT
    assert max(len(request.items) for request in fake.requests) == MAX_PART_ITEMS


async def test_a_full_queue_is_waited_out_within_the_deadline(fake: FakeReward, serve: Any) -> None:
    async with AsyncRewardClient(await serve(ADD_REWARD, fake)) as client:
        fake.errors = [queue_full("the queue", 8, 0.01), queue_full("the queue", 8, 0.01)]
        assert (await client.score(prompt="", responses=["abc"]))[0].unwrap() == 3.0
        assert len(fake.requests) == 3
        fake.errors = [queue_full("the queue", 8, 60.0)]
        with pytest.raises(SteersmanError) as caught:
            await client.score(prompt="", responses=["abc"], timeout=5.0)
        assert caught.value.reason is Reason.QUEUE_FULL
        assert len(fake.requests) == 4


async def test_an_error_of_a_whole_call_is_raised_plainly(fake: FakeReward, serve: Any) -> None:
    fake.errors = [not_found("scorer", "nobody", ["length"])]
    async with AsyncRewardClient(await serve(ADD_REWARD, fake)) as client:
        with pytest.raises(SteersmanError, match="known: length"):
            await client.score(prompt="", responses=["abc"], scorer="nobody")


async def test_a_result_too_few_is_an_error(fake: FakeReward, serve: Any) -> None:
    class Forgetful(FakeReward):
        async def Score(self, request: Any, context: Any) -> reward_pb2.ScoreResponse:
            return reward_pb2.ScoreResponse()

    async with AsyncRewardClient(await serve(ADD_REWARD, Forgetful(fake.refuse))) as client:
        with pytest.raises(SteersmanError, match="0 results came for 1 items"):
            await client.score(prompt="", responses=["abc"])


async def test_an_ok_without_a_score_is_not_taken_for_zero(fake: FakeReward, serve: Any) -> None:
    class Hollow(FakeReward):
        def result(self, item: reward_pb2.ScoreItem) -> reward_pb2.ItemScore:
            return reward_pb2.ItemScore(status=status_to_proto(None))

    async with AsyncRewardClient(await serve(ADD_REWARD, Hollow(fake.refuse))) as client:
        score = (await client.score(prompt="", responses=["abc"]))[0]
    assert score.value is None
    assert score.error is not None
    assert score.error.code is Code.DATA_LOSS


async def test_the_blocking_reward_client_does_the_same(fake: FakeReward, serve: Any) -> None:
    address = await serve(ADD_REWARD, fake)

    def talk() -> None:
        with RewardClient(address) as client:
            fake.errors = [queue_full("the queue", 8, 0.01)]
            scores = client.score(prompt="", responses=["r" * (i % 3 + 1) for i in range(2 * MAX_PART_ITEMS + 1)])
            assert [score.unwrap() for score in scores] == [i % 3 + 1 for i in range(2 * MAX_PART_ITEMS + 1)]
            assert client.score([]) == []
            assert client.scorers()[0].kind is ScorerKind.FUNCTION

    await asyncio.to_thread(talk)


async def test_a_stream_of_items_brings_each_score_as_it_is_ready(fake: FakeReward, serve: Any) -> None:
    """The service answers in pairs, the second first: sending and reading go on side by side."""
    answered = asyncio.Event()

    async def items() -> Any:
        yield ScoreItem(prompt="", response="a", id="one")
        yield ScoreItem(prompt="", response="ab", id="two")
        async with asyncio.timeout(10):
            await answered.wait()
        yield ScoreItem(prompt="", response="abc", id="three")
        yield ScoreItem(prompt="", response="x", id="bad")

    scores = []
    async with AsyncRewardClient(await serve(ADD_REWARD, fake)) as client:
        async for score in client.score_stream(items(), scorer="length"):
            scores.append(score)
            answered.set()
    assert [score.id for score in scores] == ["two", "one", "bad", "three"]
    assert [score.value for score in scores] == [2.0, 1.0, None, 3.0]
    assert fake.stream_options == ["length"]


async def test_a_stream_ends_with_the_error_of_its_source_or_of_the_service(fake: FakeReward, serve: Any) -> None:
    async def broken() -> Any:
        yield ScoreItem(prompt="", response="a", id="one")
        raise RuntimeError("the samples are gone")

    twice = [ScoreItem(prompt="", response="a", id="same")] * 2
    endless = (ScoreItem(prompt="", response="a", id=str(number)) for number in range(10**9))
    async with AsyncRewardClient(await serve(ADD_REWARD, fake)) as client, asyncio.timeout(30):
        with pytest.raises(RuntimeError, match="the samples are gone"):
            _ = [score async for score in client.score_stream(broken())]
        with pytest.raises(SteersmanError, match="id is 'same'"):
            _ = [score async for score in client.score_stream(twice)]
        with pytest.raises(SteersmanError, match="without scores for 1 items: one"):
            _ = [score async for score in client.score_stream([ScoreItem(prompt="", response="a", id="one")])]
        fake.errors = [not_found("scorer", "nobody")]
        with pytest.raises(SteersmanError) as caught:
            _ = [score async for score in client.score_stream(endless, scorer="nobody")]
    assert caught.value.reason is Reason.NOT_FOUND


async def test_the_blocking_stream_does_the_same(fake: FakeReward, serve: Any) -> None:
    address = await serve(ADD_REWARD, fake)

    def broken() -> Any:
        yield ScoreItem(prompt="", response="a", id="one")
        raise RuntimeError("the samples are gone")

    def talk() -> None:
        with RewardClient(address) as client:
            items = [ScoreItem(prompt="", response="a" * size, id=str(size)) for size in (1, 2)]
            assert [score.id for score in client.score_stream(items)] == ["2", "1"]
            with pytest.raises(RuntimeError, match="the samples are gone"):
                list(client.score_stream(broken()))

    await asyncio.to_thread(talk)


class FakeReference(reference_pb2_grpc.ReferenceServiceServicer):
    """The log-prob of a token is minus its id over the temperature; the entropy is its position in the response."""

    def __init__(self) -> None:
        self.requests: list[reference_pb2.ComputeLogprobsRequest] = []

    async def ComputeLogprobs(
        self, request: reference_pb2.ComputeLogprobsRequest, context: Any
    ) -> reference_pb2.ComputeLogprobsResponse:
        self.requests.append(request)
        rows = from_ragged(request.token_ids, "token_ids", np.int32)
        lengths = from_tensor(request.prompt_lengths, "prompt_lengths", np.int32).tolist()
        responses = [row[length:] for row, length in zip(rows, lengths, strict=True)]
        answer = reference_pb2.ComputeLogprobsResponse(
            logprobs=to_ragged([-row / request.temperature for row in responses], np.float32),
            model=types_pb2.ModelInfo(name="frozen", dtype=types_pb2.DATA_TYPE_FLOAT32),
        )
        if request.include_entropy:
            entropies = to_ragged([np.arange(len(row)) for row in responses], np.float32)
            answer.entropies.CopyFrom(entropies)
        return answer


async def test_logprobs_of_a_batch_of_any_size_keep_the_order(serve: Any) -> None:
    fake = FakeReference()
    address = await serve(ADD_REFERENCE, fake)
    sequences = [np.arange(1, 3 + index % 4, dtype=np.int32) for index in range(MAX_PART_ITEMS + 3)]
    async with AsyncReferenceClient(address) as client:
        result = await client.logprobs(sequences, 1, temperature=2.0, entropy=True)
        assert [row.tolist() for row in result.logprobs] == [(-row[1:] / 2).tolist() for row in sequences]
        assert result.entropies is not None
        assert [row.tolist() for row in result.entropies] == [list(range(len(row) - 1)) for row in sequences]
        assert result.model is not None
        assert result.model.name == "frozen"
        assert len(fake.requests) == 2
        short = await client.logprobs([[1, 2, 3, 4]], [3])
        assert short.logprobs[0].tolist() == [-4.0]
        assert short.entropies is None
        assert (await client.logprobs([])).logprobs == []

    def talk() -> None:
        with ReferenceClient(address) as client:
            blocking = client.logprobs(sequences, 1, temperature=2.0)
            assert [row.tolist() for row in blocking.logprobs] == [row.tolist() for row in result.logprobs]

    await asyncio.to_thread(talk)


@pytest.mark.parametrize(
    ("sequences", "lengths", "field"),
    [
        ([[1, 2], [3]], None, r"sequences\[1\]"),
        ([[1, 2]], [2], r"prompt_lengths\[0\]"),
        ([[1, 2]], [1, 1], "prompt_lengths"),
        ([[1, -2]], None, r"sequences\[0\]"),
        ([[1, 2**31]], None, r"sequences\[0\]"),
        ([[1.5, 2.0]], None, r"sequences\[0\]"),
    ],
)
async def test_malformed_sequences_are_refused_before_they_are_sent(sequences: Any, lengths: Any, field: str) -> None:
    async with AsyncReferenceClient("127.0.0.1:1") as client:
        with pytest.raises(SteersmanError, match=field) as caught:
            await client.logprobs(sequences, lengths)
    assert caught.value.reason is Reason.INVALID_FIELD
