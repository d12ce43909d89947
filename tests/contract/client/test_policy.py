"""The policy client against a server: streams, retries, deadlines, cancellation, errors."""

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest

from steersman.client import AsyncPolicyClient, ChannelSettings, ChatMessage, FinishReason, PolicyClient, request_id
from steersman.v1 import policy_pb2, policy_pb2_grpc, types_pb2
from steersman.wire.errors import Code, FieldViolation, Reason, SteersmanError, invalid_field, queue_full, unavailable
from steersman.wire.identity import VersionSpan, WeightVersion

ADD = policy_pb2_grpc.add_PolicyServiceServicer_to_server


def span(step: int, start: int, end: int) -> types_pb2.WeightVersionSpan:
    version = types_pb2.WeightVersion(run_id="run", step=step)
    return types_pb2.WeightVersionSpan(version=version, start=start, end=end)


class FakePolicy(policy_pb2_grpc.PolicyServiceServicer):
    """Two tokens a delta, two deltas a sample; `errors` are raised by the next calls, one each."""

    def __init__(self, refuse: Any) -> None:
        self.refuse = refuse
        self.requests: list[policy_pb2.GenerateRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.errors: list[SteersmanError] = []
        self.fail_after_messages: int | None = None
        self.hang = False
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def GetModel(self, request: Any, context: Any) -> policy_pb2.PolicyServiceGetModelResponse:
        self.metadata.append(dict(context.invocation_metadata()))
        if self.errors:
            await self.refuse(context, self.errors.pop(0))
        model = types_pb2.ModelInfo(name="tiny", dtype=types_pb2.DATA_TYPE_FLOAT32, eos_token_ids=[2])
        return policy_pb2.PolicyServiceGetModelResponse(model=model)

    async def Generate(self, request: policy_pb2.GenerateRequest, context: Any) -> Any:
        self.requests.append(request)
        if self.errors:
            await self.refuse(context, self.errors.pop(0))
        self.entered.set()
        if self.hang:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        count = request.sampling.num_samples or 1
        messages = self.finals(count) if request.output_mode == policy_pb2.OUTPUT_MODE_FINAL else self.deltas(count)
        for number, message in enumerate(messages):
            if number == 0:
                message.model.name = "tiny"
                message.model.dtype = types_pb2.DATA_TYPE_FLOAT32
                if request.WhichOneof("prompt") != "prompt_token_ids":
                    message.prompt_token_ids.ids.extend([7, 8])
            if number == self.fail_after_messages:
                await self.refuse(context, unavailable("the engine died"))
            yield message

    def finals(self, count: int) -> list[policy_pb2.GenerateResponse]:
        return [
            policy_pb2.GenerateResponse(
                sample_index=index,
                token_ids=[10, 11, 12, 2],
                logprobs=[-0.5, -1.0, -1.5, -2.0],
                weight_versions=[span(3, 0, 2), span(4, 2, 4)],
                finish_reason=policy_pb2.FINISH_REASON_STOP,
                text=f"answer {index}",
            )
            for index in reversed(range(count))
        ]

    def deltas(self, count: int) -> list[policy_pb2.GenerateResponse]:
        first = [
            policy_pb2.GenerateResponse(
                sample_index=index,
                token_ids=[10, 11],
                logprobs=[-0.5, -1.0],
                weight_versions=[span(3, 0, 2)],
                text="ab",
            )
            for index in range(count)
        ]
        last = [
            policy_pb2.GenerateResponse(
                sample_index=index,
                token_ids=[12],
                logprobs=[-1.5],
                weight_versions=[span(3, 2, 3)],
                text="c",
                finish_reason=policy_pb2.FINISH_REASON_LENGTH,
            )
            for index in range(count)
        ]
        return first + last


@pytest.fixture
def fake(refuse: Any) -> FakePolicy:
    return FakePolicy(refuse)


async def test_generate_returns_samples_by_index_with_everything(fake: FakePolicy, serve: Any) -> None:
    async with AsyncPolicyClient(await serve(ADD, fake)) as client:
        samples = await client.generate([5, 6], num_samples=2, temperature=0.7, seed=None, max_tokens=4)
    assert [sample.index for sample in samples] == [0, 1]
    first = samples[0]
    assert first.token_ids.dtype == np.int32
    assert first.token_ids.tolist() == [10, 11, 12, 2]
    assert first.logprobs.dtype == np.float32
    assert first.logprobs.tolist() == [-0.5, -1.0, -1.5, -2.0]
    assert first.weight_versions == (
        VersionSpan(version=WeightVersion(run_id="run", step=3), start=0, end=2),
        VersionSpan(version=WeightVersion(run_id="run", step=4), start=2, end=4),
    )
    assert first.finish_reason is FinishReason.STOP
    assert first.model is not None
    assert first.model.name == "tiny"
    assert first.prompt_token_ids is None
    sent = fake.requests[0]
    assert list(sent.prompt_token_ids.ids) == [5, 6]
    assert sent.sampling.temperature == pytest.approx(0.7)
    assert sent.sampling.max_tokens == 4
    assert not sent.sampling.HasField("seed")
    assert not sent.sampling.HasField("top_p")
    assert sent.output_mode == policy_pb2.OUTPUT_MODE_FINAL


async def test_samples_come_in_the_order_of_their_ends(fake: FakePolicy, serve: Any) -> None:
    async with AsyncPolicyClient(await serve(ADD, fake)) as client:
        assert [sample.index async for sample in client.samples("hello", num_samples=3)] == [2, 1, 0]
    assert fake.requests[0].text == "hello"


async def test_stream_yields_deltas(fake: FakePolicy, serve: Any) -> None:
    chat = [ChatMessage(role="system", content="be brief"), {"role": "user", "content": "hi"}]
    async with AsyncPolicyClient(await serve(ADD, fake)) as client:
        deltas = [delta async for delta in client.stream(chat, return_text=True)]
    assert [delta.text for delta in deltas] == ["ab", "c"]
    assert [delta.finish_reason for delta in deltas] == [None, FinishReason.LENGTH]
    turns = fake.requests[0].chat.messages
    assert [(turn.role, turn.content) for turn in turns] == [("system", "be brief"), ("user", "hi")]


async def test_unavailable_is_retried_and_nothing_else(fake: FakePolicy, serve: Any) -> None:
    settings = ChannelSettings(retry_initial_backoff_seconds=0.01)
    async with AsyncPolicyClient(await serve(ADD, fake), settings=settings) as client:
        fake.errors = [unavailable("starting"), unavailable("starting")]
        assert len(await client.generate([1])) == 1
        assert len(fake.requests) == 3
        for error in (SteersmanError(Reason.INTERNAL, "a defect"), SteersmanError(Reason.NOT_FOUND, "none")):
            fake.requests.clear()
            fake.errors = [error]
            with pytest.raises(SteersmanError) as caught:
                await client.generate([1])
            assert caught.value.reason is error.reason
            assert len(fake.requests) == 1


async def test_a_stream_that_brought_tokens_is_not_repeated(fake: FakePolicy, serve: Any) -> None:
    fake.fail_after_messages = 1
    async with AsyncPolicyClient(await serve(ADD, fake)) as client:
        deltas = client.stream([1], num_samples=2)
        await anext(deltas)
        with pytest.raises(SteersmanError, match="the engine died"):
            await anext(deltas)
    assert len(fake.requests) == 1


async def test_errors_keep_reason_violations_and_request_id(fake: FakePolicy, serve: Any) -> None:
    fake.errors = [invalid_field("sampling.temperature", -1.0, "at least 0")]
    token = request_id.set("request-7")
    try:
        async with AsyncPolicyClient(await serve(ADD, fake)) as client:
            with pytest.raises(SteersmanError) as caught:
                await client.model()
    finally:
        request_id.reset(token)
    error = caught.value
    assert error.reason is Reason.INVALID_FIELD
    assert error.code is Code.INVALID_ARGUMENT
    assert error.violations == (
        FieldViolation(field="sampling.temperature", description="is -1.0, allowed: at least 0"),
    )
    assert fake.metadata[0]["x-request-id"] == "request-7"
    assert "x-request-id: request-7" in error.__notes__


async def test_a_deadline_ends_a_call_and_reaches_the_server(fake: FakePolicy, serve: Any) -> None:
    fake.hang = True
    async with AsyncPolicyClient(await serve(ADD, fake)) as client:
        with pytest.raises(SteersmanError) as caught:
            await client.generate([1], timeout=0.2)
        assert caught.value.code is Code.DEADLINE_EXCEEDED
        async with asyncio.timeout(10):
            await fake.cancelled.wait()


async def test_cancelling_the_task_cancels_the_call(fake: FakePolicy, serve: Any) -> None:
    fake.hang = True
    async with AsyncPolicyClient(await serve(ADD, fake)) as client:
        task = asyncio.create_task(client.generate([1]))
        async with asyncio.timeout(10):
            await fake.entered.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await fake.cancelled.wait()


async def test_leaving_the_iterator_cancels_the_call(fake: FakePolicy, serve: Any) -> None:
    class Endless(FakePolicy):
        async def Generate(self, request: Any, context: Any) -> Any:
            try:
                yield self.deltas(1)[0]
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()

    endless = Endless(fake.refuse)
    async with AsyncPolicyClient(await serve(ADD, endless)) as client, asyncio.timeout(10):
        async for _ in client.stream([1]):
            break
        await endless.cancelled.wait()


async def test_a_cancellation_by_the_server_does_not_end_the_task(fake: FakePolicy, serve: Any) -> None:
    fake.errors = [SteersmanError(Reason.CANCELLED, "shutting down")] * 2
    async with AsyncPolicyClient(await serve(ADD, fake)) as client:
        for call in (client.generate([1]), client.model()):
            with pytest.raises(SteersmanError) as caught:
                await call
            assert caught.value.code is Code.CANCELLED


async def test_a_full_queue_is_waited_out_before_the_first_token(fake: FakePolicy, serve: Any) -> None:
    fake.errors = [queue_full("the queue", 4, 0.01)]
    async with AsyncPolicyClient(await serve(ADD, fake)) as client:
        assert len(await client.generate([1])) == 1
    assert len(fake.requests) == 2


async def test_a_stream_that_ends_early_is_an_error(fake: FakePolicy, serve: Any) -> None:
    class Short(FakePolicy):
        def finals(self, count: int) -> list[policy_pb2.GenerateResponse]:
            return super().finals(count)[:-1]

    async with AsyncPolicyClient(await serve(ADD, Short(fake.refuse))) as client:
        with pytest.raises(SteersmanError, match="1 of 2 samples"):
            await client.generate([1], num_samples=2)


async def test_calls_spread_over_an_address_list(fake: FakePolicy, serve: Any, refuse: Any) -> None:
    other = FakePolicy(refuse)
    target = f"{await serve(ADD, fake)},{await serve(ADD, other)}"
    async with AsyncPolicyClient(target) as client, asyncio.timeout(30):
        while not (fake.requests and other.requests):
            await client.generate([1])


async def test_no_server_is_unavailable_and_names_the_target() -> None:
    settings = ChannelSettings(retry_attempts=1)
    async with AsyncPolicyClient("127.0.0.1:1", settings=settings) as client:
        with pytest.raises(SteersmanError, match=r"127\.0\.0\.1:1") as caught:
            await client.model()
    assert caught.value.code is Code.UNAVAILABLE


@pytest.mark.parametrize("blocking", [False, True])
async def test_a_server_that_goes_for_good_while_retried_ends_the_call(
    fake: FakePolicy, serve: Any, refuse: Any, blocking: bool
) -> None:
    """The last try finds no server at all; a blocking stream that gRPC itself retries never ends then."""
    server = grpc.aio.server()
    ADD(fake, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    fake.errors = [unavailable("the engine died")] * 9
    settings = ChannelSettings(retry_initial_backoff_seconds=0.3, retry_attempts=3)

    async def ask() -> None:
        async with AsyncPolicyClient(address, settings=settings) as client:
            await client.generate([1], timeout=20.0)

    def ask_blocking() -> None:
        with PolicyClient(address, settings=settings) as client:
            client.generate([1], timeout=20.0)

    async with asyncio.timeout(30):
        task = asyncio.create_task(asyncio.to_thread(ask_blocking) if blocking else ask())
        while not fake.requests:
            await asyncio.sleep(0.01)
        await server.stop(None)
        with pytest.raises(SteersmanError) as caught:
            await task
    assert caught.value.code is Code.UNAVAILABLE


async def test_the_blocking_client_does_the_same(fake: FakePolicy, serve: Any) -> None:
    address = await serve(ADD, fake)

    def talk() -> None:
        with PolicyClient(address, settings=ChannelSettings(retry_initial_backoff_seconds=0.01)) as client:
            fake.errors = [unavailable("starting")]
            samples = client.generate("hello", num_samples=2)
            assert [sample.text for sample in samples] == ["answer 0", "answer 1"]
            assert samples[0].prompt_token_ids is not None
            assert samples[0].prompt_token_ids.tolist() == [7, 8]
            assert [delta.text for delta in client.stream([1])] == ["ab", "c"]
            assert client.model().eos_token_ids == (2,)
            fake.errors = [invalid_field("prompt", "", "at least one token")]
            with pytest.raises(SteersmanError) as caught:
                client.generate([1])
            assert caught.value.reason is Reason.INVALID_FIELD
            fake.hang = True
            with pytest.raises(SteersmanError) as late:
                client.generate([1], timeout=0.2)
            assert late.value.code is Code.DEADLINE_EXCEEDED

    await asyncio.to_thread(talk)


def test_grpc_status_codes_are_the_canonical_ones() -> None:
    assert {code.value[0] for code in grpc.StatusCode} == {int(code) for code in Code}
