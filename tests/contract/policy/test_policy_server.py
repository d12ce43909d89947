"""PolicyService and WeightService on a real grpc.aio server, with a fake engine."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from policy_fakes import MANIFEST, FakeEngine, FakeSource, chunks, host_bytes, random_weights, slow_digest

from steersman.policy.app import PolicyService
from steersman.policy.settings import PolicySettings
from steersman.serving.metrics import Metrics
from steersman.serving.server import RunningServer, start_server
from steersman.v1 import policy_pb2, policy_pb2_grpc, types_pb2, weights_pb2, weights_pb2_grpc
from steersman.wire.errors import Reason, SteersmanError
from steersman.wire.status import DETAILS_TRAILER, decode_error
from steersman.wire.tensors import DTYPE_NAMES

TIMEOUT_S = 20


class Harness:
    """A running server, its stubs, and the fake engine behind it."""

    def __init__(self, server: RunningServer, engine: FakeEngine, metrics: Metrics) -> None:
        self.server, self.engine, self.metrics = server, engine, metrics
        self.channel = grpc.aio.insecure_channel(server.address)
        self.policy = policy_pb2_grpc.PolicyServiceStub(self.channel)
        self.weights = weights_pb2_grpc.WeightServiceStub(self.channel)

    async def generate(self, request: policy_pb2.GenerateRequest) -> list[policy_pb2.GenerateResponse]:
        return [response async for response in self.policy.Generate(request, timeout=TIMEOUT_S)]

    async def state(self) -> weights_pb2.GetWeightStateResponse:
        return await self.weights.GetWeightState(weights_pb2.GetWeightStateRequest(), timeout=TIMEOUT_S)

    async def begin(self, step: int, run_id: str = "run") -> str:
        request = weights_pb2.BeginPushRequest(
            version=types_pb2.WeightVersion(run_id=run_id, step=step), manifest=manifest_message()
        )
        response = await self.weights.BeginPush(request, timeout=TIMEOUT_S)
        return str(response.push_id)

    async def send(self, push_id: str, step: int) -> weights_pb2.PushChunksResponse:
        return await self.weights.PushChunks(chunk_messages(push_id, step), timeout=TIMEOUT_S)

    async def push(self, step: int, **activation: object) -> weights_pb2.ActivateResponse:
        push_id = await self.begin(step)
        await self.send(push_id, step)
        digest = slow_digest(random_weights(step))
        await self.weights.Stage(weights_pb2.StageRequest(push_id=push_id, digest=digest), timeout=TIMEOUT_S)
        version = types_pb2.WeightVersion(run_id="run", step=step)
        request = weights_pb2.ActivateRequest(version=version, **activation)  # type: ignore[arg-type]
        return await self.weights.Activate(request, timeout=TIMEOUT_S)


def manifest_message() -> weights_pb2.WeightManifest:
    return weights_pb2.WeightManifest(
        tensors=[
            weights_pb2.TensorSpec(name=tensor.name, shape=tensor.shape, dtype=DTYPE_NAMES[tensor.dtype])
            for tensor in MANIFEST.tensors
        ]
    )


def chunk_messages(push_id: str, step: int) -> list[weights_pb2.PushChunksRequest]:
    messages = [
        weights_pb2.PushChunksRequest(
            chunk=weights_pb2.WeightChunk(
                tensor_index=chunk.tensor_index,
                element_offset=chunk.element_offset,
                num_elements=chunk.num_elements,
                encoding=weights_pb2.WEIGHT_ENCODING_DENSE,
                data=chunk.data,
                checksum=chunk.checksum,
            )
        )
        for chunk in chunks(random_weights(step))
    ]
    messages[0].push_id = push_id
    return messages


def prompt(*ids: int, **sampling: object) -> policy_pb2.GenerateRequest:
    return policy_pb2.GenerateRequest(
        prompt_token_ids=types_pb2.TokenIds(ids=ids),
        sampling=policy_pb2.SamplingParameters(**sampling),  # type: ignore[arg-type]
    )


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    settings = PolicySettings(model="unused", port=0, metrics_port=None, health_interval_seconds=0.01)
    engine, metrics = FakeEngine(), Metrics("policy")
    service = PolicyService(engine, FakeSource(), settings, metrics)
    server = await start_server(service, settings, metrics)
    harness = Harness(server, engine, metrics)
    yield harness
    await harness.channel.close()
    await server.stop()
    assert engine.events[-1] == "shutdown"


def public(error: grpc.aio.AioRpcError) -> SteersmanError:
    trailers = dict(error.trailing_metadata() or ())
    return decode_error(error.code().value[0], error.details() or "", trailers.get(DETAILS_TRAILER))


async def test_deltas_carry_tokens_logprobs_and_versions(harness: Harness) -> None:
    responses = await harness.generate(prompt(7, max_tokens=3))
    assert [list(response.token_ids) for response in responses] == [[7], [8], [9]]
    assert [list(response.logprobs) for response in responses] == [[-0.5]] * 3
    assert [(span.start, span.end) for response in responses for span in response.weight_versions] == [
        (0, 1),
        (1, 2),
        (2, 3),
    ]
    first, *_, last = responses
    assert first.model.name == "fake"
    assert first.model.revision.startswith("xxh3:")
    assert not any(response.HasField("model") for response in responses[1:])
    assert not first.HasField("prompt_token_ids")
    assert (first.finish_reason, last.finish_reason) == (0, policy_pb2.FINISH_REASON_LENGTH)
    assert last.time_to_first_token == Duration(nanos=250_000_000)


async def test_final_mode_sends_one_message_a_sample(harness: Harness) -> None:
    request = prompt(7, max_tokens=3, num_samples=4)
    request.output_mode = policy_pb2.OUTPUT_MODE_FINAL
    responses = await harness.generate(request)
    assert [response.sample_index for response in responses] == [0, 1, 2, 3]
    assert [response.token_ids[0] for response in responses] == [7, 8, 9, 10]
    assert all(len(response.token_ids) == 3 for response in responses)


async def test_text_and_chat_tell_their_tokens(harness: Harness) -> None:
    text = policy_pb2.GenerateRequest(text="ab", sampling=policy_pb2.SamplingParameters(max_tokens=1))
    (response,) = await harness.generate(text)
    assert list(response.prompt_token_ids.ids) == harness.engine.encode_text("ab")
    chat = policy_pb2.GenerateRequest(
        chat=types_pb2.Chat(messages=[types_pb2.ChatMessage(role="u", content="c")]),
        sampling=policy_pb2.SamplingParameters(max_tokens=1),
    )
    (response,) = await harness.generate(chat)
    assert list(response.prompt_token_ids.ids) == harness.engine.encode_chat([("u", "c")])


async def test_every_field_reaches_the_engine(harness: Harness) -> None:
    request = prompt(
        3,
        4,
        num_samples=2,
        temperature=0.5,
        top_p=0.25,
        top_k=9,
        max_tokens=5,
        min_tokens=2,
        seed=11,
        stop=["x", "y"],
        stop_token_ids=[1, 2],
        ignore_eos=True,
    )
    request.priority = -3
    request.return_text = True
    await harness.generate(request)
    (seen,) = harness.engine.requests
    assert list(seen.prompt_token_ids) == [3, 4]
    assert (seen.num_samples, seen.temperature, seen.top_p, seen.top_k) == (2, 0.5, 0.25, 9)
    assert (seen.max_tokens, seen.min_tokens, seen.seed) == (5, 2, 11)
    assert (seen.stop, seen.stop_token_ids, seen.ignore_eos) == (("x", "y"), (1, 2), True)
    assert (seen.priority, seen.return_text, seen.final_only) == (-3, True, False)


async def test_explicit_zeros_are_not_defaults(harness: Harness) -> None:
    await harness.generate(prompt(3, temperature=0, seed=0, max_tokens=1))
    (seen,) = harness.engine.requests
    assert (seen.temperature, seen.seed) == (0, 0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.generate(prompt(3, num_samples=0))
    assert public(caught.value).violations[0].field == "sampling.num_samples"


@pytest.mark.parametrize(
    ("request_message", "reason"),
    [
        (policy_pb2.GenerateRequest(), Reason.INVALID_FIELD),
        (prompt(), Reason.INVALID_FIELD),
        (prompt(1, 999), Reason.TOKEN_OUT_OF_VOCABULARY),
        (prompt(*[1] * 40), Reason.SEQUENCE_TOO_LONG),
    ],
)
async def test_bad_requests_are_refused_and_the_service_serves_on(
    harness: Harness, request_message: policy_pb2.GenerateRequest, reason: Reason
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.generate(request_message)
    error = public(caught.value)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.reason, len(error.violations)) == (reason, 1)
    assert len(await harness.generate(prompt(1, max_tokens=2))) == 2


async def test_cancelling_the_call_aborts_in_the_engine(harness: Harness) -> None:
    harness.engine.gate.clear()
    call = harness.policy.Generate(prompt(7, max_tokens=5))
    await asyncio.wait_for(harness.engine.started.wait(), TIMEOUT_S)
    call.cancel()
    await asyncio.wait_for(harness.engine.ended.wait(), TIMEOUT_S)
    assert harness.engine.events == ["aborted"]


async def test_a_deadline_aborts_in_the_engine(harness: Harness) -> None:
    harness.engine.gate.clear()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.policy.Generate(prompt(7, max_tokens=5), timeout=0.2).read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(harness.engine.ended.wait(), TIMEOUT_S)
    assert harness.engine.events == ["aborted"]


async def test_a_push_changes_the_weights_under_a_running_request(harness: Harness) -> None:
    harness.engine.num_free_tokens = 1
    harness.engine.gate.clear()
    call = harness.policy.Generate(prompt(7, max_tokens=4), timeout=TIMEOUT_S)
    stream = aiter(call)
    seen = [await anext(stream)]
    activation = await harness.push(1, kv_cache_policy=weights_pb2.KV_CACHE_POLICY_RECOMPUTE)
    assert activation.active.version == types_pb2.WeightVersion(run_id="run", step=1)
    assert activation.pause == Duration(nanos=125_000_000)
    harness.engine.gate.set()
    seen += [response async for response in stream]
    assert [response.weight_versions[0].version.step for response in seen] == [0, 1, 1, 1]
    assert activation.num_running_requests == 1
    assert [token for response in seen for token in response.token_ids] == [7, 8, 9, 10]
    assert "run@1 recompute" in harness.engine.events
    assert harness.engine.loaded == host_bytes(random_weights(1))
    model = await harness.policy.GetModel(policy_pb2.PolicyServiceGetModelRequest(), timeout=TIMEOUT_S)
    assert model.model.weight_version.step == 1


async def test_the_state_tells_the_whole_transaction(harness: Harness) -> None:
    request = weights_pb2.GetWeightStateRequest(include_manifest=True)
    state = await harness.weights.GetWeightState(request, timeout=TIMEOUT_S)
    assert state.manifest == manifest_message()
    assert state.total_bytes == MANIFEST.total_bytes
    assert state.active.HasField("activate_time")
    assert not state.HasField("staged")
    assert not state.HasField("previous")
    assert not state.HasField("pushing")
    push_id = await harness.begin(1)
    assert (await harness.state()).pushing.step == 1
    received = await harness.send(push_id, 1)
    assert (received.received_bytes, received.num_chunks) == (62, 6)
    digest = slow_digest(random_weights(1))
    await harness.weights.Stage(weights_pb2.StageRequest(push_id=push_id, digest=digest), timeout=TIMEOUT_S)
    state = await harness.state()
    assert (state.staged.version.step, state.staged.digest) == (1, digest)
    assert not state.staged.HasField("activate_time")
    await harness.weights.AbortPush(weights_pb2.AbortPushRequest(push_id=push_id), timeout=TIMEOUT_S)
    assert not (await harness.state()).HasField("pushing")


async def test_rollback(harness: Harness) -> None:
    before = await harness.state()
    await harness.push(1)
    response = await harness.weights.Rollback(
        weights_pb2.RollbackRequest(version=types_pb2.WeightVersion()), timeout=TIMEOUT_S
    )
    assert response.active.digest == before.active.digest
    assert (await harness.state()).previous.version.step == 1


async def test_a_push_of_active_weights_says_so(harness: Harness) -> None:
    await harness.push(1)
    assert await harness.begin(1) == ""
    request = weights_pb2.BeginPushRequest(
        version=types_pb2.WeightVersion(run_id="run", step=1),
        manifest=manifest_message(),
        digest=slow_digest(random_weights(2)),
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.weights.BeginPush(request, timeout=TIMEOUT_S)
    assert public(caught.value).reason is Reason.WEIGHT_VERSION_STALE


async def test_a_broken_stream_leaves_the_old_weights(harness: Harness) -> None:
    before = await harness.state()
    push_id = await harness.begin(1)
    call = harness.weights.PushChunks()
    for message in chunk_messages(push_id, 1)[:3]:
        await call.write(message)
    call.cancel()
    # The push ends with its sender, not with its lease: whoever comes next need not wait.
    async with asyncio.timeout(TIMEOUT_S):
        while (await harness.state()).HasField("pushing"):
            await asyncio.sleep(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.weights.Stage(
            weights_pb2.StageRequest(push_id=push_id, digest=slow_digest(random_weights(1))),
            timeout=TIMEOUT_S,
        )
    assert public(caught.value).reason is Reason.WEIGHT_PUSH_NOT_ACTIVE
    assert (await harness.state()).active == before.active
    assert await harness.begin(1, run_id="another")


async def test_unknown_enum_values_are_refused(harness: Harness) -> None:
    request = policy_pb2.GenerateRequest(text="a", output_mode=77)  # type: ignore[arg-type]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.policy.Generate(request, timeout=TIMEOUT_S).read()
    assert [violation.field for violation in public(caught.value).violations] == ["output_mode"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.weights.Activate(weights_pb2.ActivateRequest(kv_cache_policy=9), timeout=TIMEOUT_S)  # type: ignore[arg-type]
    assert [violation.field for violation in public(caught.value).violations] == ["kv_cache_policy"]


async def test_a_lease_beyond_all_measure_is_refused(harness: Harness) -> None:
    request = weights_pb2.BeginPushRequest(
        version=types_pb2.WeightVersion(run_id="run", step=1), manifest=manifest_message()
    )
    request.idle_timeout.seconds = 2**62
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.weights.BeginPush(request, timeout=TIMEOUT_S)
    assert [violation.field for violation in public(caught.value).violations] == ["idle_timeout"]


async def test_two_streams_share_a_push(harness: Harness) -> None:
    push_id = await harness.begin(1)
    messages = chunk_messages("", 1)
    streams = [messages[::2], messages[1::2]]
    for stream in streams:
        stream[0].push_id = push_id
    calls = [harness.weights.PushChunks(stream, timeout=TIMEOUT_S) for stream in streams]
    received = [await call for call in calls]
    assert sum(response.num_chunks for response in received) == len(messages)
    digest = slow_digest(random_weights(1))
    await harness.weights.Stage(weights_pb2.StageRequest(push_id=push_id, digest=digest), timeout=TIMEOUT_S)


async def test_errors_of_the_weight_plane_have_their_codes(harness: Harness) -> None:
    await harness.begin(1, "first")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.begin(1, "second")
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert public(caught.value).retry_after_seconds == pytest.approx(60, abs=10)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.send("no-such-push", 1)
    assert public(caught.value).reason is Reason.WEIGHT_PUSH_NOT_ACTIVE
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.weights.BeginPush(
            weights_pb2.BeginPushRequest(version=types_pb2.WeightVersion(run_id="first", step=2)),
            timeout=TIMEOUT_S,
        )
    assert public(caught.value).reason is Reason.WEIGHT_MANIFEST_MISMATCH


async def test_a_dead_engine_ends_the_server(harness: Harness) -> None:
    harness.engine.dead = True
    await asyncio.wait_for(harness.server.engine_dead.wait(), TIMEOUT_S)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.generate(prompt(1))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_metrics(harness: Harness) -> None:
    await harness.generate(prompt(1, 2, max_tokens=3))
    await harness.push(4)
    value = harness.metrics.registry.get_sample_value
    assert value("steersman_policy_prompt_tokens_total") == 2
    assert value("steersman_policy_generated_tokens_total") == 3
    assert value("steersman_policy_samples_total", {"finish_reason": "length"}) == 1
    assert value("steersman_policy_samples_in_flight") == 0
    assert value("steersman_policy_tokens_in_flight") == 0
    assert value("steersman_policy_weight_step") == 4
    assert value("steersman_policy_weight_received_bytes_total") == 62
    assert value("steersman_policy_weight_pause_seconds_sum") == 0.125
    assert value("steersman_policy_weight_push_seconds_count") == 1
