"""The policy service as a process of its own, over gRPC: log-probs against transformers, and a live push."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import grpc
import psutil
import pytest
import torch
import xxhash
from tiny_models import VOCAB_SIZE, save_model, save_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from steersman.policy.weights.checkpoint import Checkpoint
from steersman.policy.weights.manifest import digest
from steersman.v1 import policy_pb2, policy_pb2_grpc, types_pb2, weights_pb2, weights_pb2_grpc
from steersman.wire.tensors import dtype_from_name

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
START_S, CALL_S = 120, 90
CHUNK_ELEMENTS = 10_000
TOLERANCE = 1e-4
"""Largest difference of float32 log-probs between vLLM and transformers that is rounding."""


@dataclass
class Sample:
    """One sample put together from its messages."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    finish_reason: int = 0

    def add(self, response: policy_pb2.GenerateResponse) -> None:
        for span in response.weight_versions:
            assert span.start == len(self.steps)
            self.steps += [span.version.step] * (span.end - span.start)
        self.tokens += response.token_ids
        self.logprobs += response.logprobs
        self.finish_reason = response.finish_reason or self.finish_reason
        assert len(self.tokens) == len(self.logprobs) == len(self.steps)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [tmp_path_factory.mktemp("start"), tmp_path_factory.mktemp("pushed")]


@pytest.fixture(scope="module")
def models(folders: list[Path]) -> list[PreTrainedModel]:
    save_tokenizer(folders[0])
    return [save_model("llama", folder, seed) for seed, folder in enumerate(folders)]


@contextmanager
def running(folder: Path, log: Path) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """A policy server and its address."""
    command = [sys.executable, "-m", "steersman.policy", "--model", str(folder), "--kv-cache-mib", "32"]
    command += ["--load-chunk-bytes", "65536", "--max-num-seqs", "16", "--port", "0", "--metrics-port", "0"]
    with log.open("wb") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        yield process, _wait_for_address(process, log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def address(
    folders: list[Path], models: list[PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "policy.log"
    with running(folders[0], log) as (process, address):
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()[-4000:]


def _wait_for_address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    for _ in range(START_S * 10):
        if found := re.search(r"ready .*address=(\S+)", log.read_text()):
            return found.group(1)
        try:
            process.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"the server did not start:\n{log.read_text()[-4000:]}")


@pytest.fixture
async def channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield channel


async def generate(
    channel: grpc.aio.Channel, prompt: list[int], *, final: bool = False, **sampling: object
) -> list[Sample]:
    request = policy_pb2.GenerateRequest(
        prompt_token_ids=types_pb2.TokenIds(ids=prompt),
        sampling=policy_pb2.SamplingParameters(**sampling),  # type: ignore[arg-type]
        output_mode=policy_pb2.OUTPUT_MODE_FINAL if final else policy_pb2.OUTPUT_MODE_DELTA,
    )
    samples: dict[int, Sample] = {}
    async for response in policy_pb2_grpc.PolicyServiceStub(channel).Generate(request, timeout=CALL_S):
        samples.setdefault(response.sample_index, Sample(prompt=prompt)).add(response)
    return [samples[index] for index in sorted(samples)]


def reference_logprobs(model: PreTrainedModel, sample: Sample, temperature: float) -> torch.Tensor:
    """[num_tokens] log-probs of the sampled tokens in one forward pass of transformers."""
    ids = torch.tensor([sample.prompt + sample.tokens])
    with torch.no_grad():
        logits = model(ids).logits[0, len(sample.prompt) - 1 : -1].float() / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]


def assert_sampled_from(models: list[PreTrainedModel], sample: Sample, temperature: float) -> None:
    """Every token has the log-prob that the model of its stamped version gives it."""
    by_step = torch.stack([reference_logprobs(model, sample, temperature) for model in models])
    expected = by_step.gather(0, torch.tensor(sample.steps)[None])[0]
    assert (expected - torch.tensor(sample.logprobs)).abs().max() < TOLERANCE


async def push(
    channel: grpc.aio.Channel,
    folder: Path,
    step: int,
    kv_cache: weights_pb2.KvCachePolicy = weights_pb2.KV_CACHE_POLICY_RECOMPUTE,
) -> weights_pb2.ActivateResponse:
    """Sends the checkpoint in `folder` and activates it as `step` of run "run"."""
    stub = weights_pb2_grpc.WeightServiceStub(channel)
    checkpoint = Checkpoint(folder)
    copy = memoryview(bytearray(checkpoint.manifest.nbytes))
    checkpoint.read_into(copy)
    version = types_pb2.WeightVersion(run_id="run", step=step)
    manifest = weights_pb2.WeightManifest(
        tensors=[
            weights_pb2.TensorSpec(name=t.name, shape=t.shape, dtype=dtype_from_name(t.dtype))
            for t in checkpoint.manifest.tensors
        ]
    )
    begun = await stub.BeginPush(weights_pb2.BeginPushRequest(version=version, manifest=manifest), timeout=CALL_S)

    def requests() -> Iterator[weights_pb2.PushChunksRequest]:
        for index, (tensor, slot) in enumerate(
            zip(checkpoint.manifest.tensors, checkpoint.manifest.slots, strict=True)
        ):
            for offset in range(0, tensor.num_elements, CHUNK_ELEMENTS):
                count = min(CHUNK_ELEMENTS, tensor.num_elements - offset)
                start = slot.offset_bytes + offset * tensor.item_bytes
                data = bytes(copy[start : start + count * tensor.item_bytes])
                chunk = weights_pb2.WeightChunk(
                    tensor_index=index,
                    element_offset=offset,
                    num_elements=count,
                    encoding=weights_pb2.WEIGHT_ENCODING_DENSE,
                    data=data,
                    checksum=xxhash.xxh3_64_intdigest(data),
                )
                yield weights_pb2.PushChunksRequest(push_id=begun.push_id, chunk=chunk)

    await stub.PushChunks(requests(), timeout=CALL_S)
    found = digest(checkpoint.manifest, copy)
    await stub.Stage(weights_pb2.StageRequest(push_id=begun.push_id, digest=found), timeout=CALL_S)
    return await stub.Activate(
        weights_pb2.ActivateRequest(version=version, kv_cache_policy=kv_cache),
        timeout=CALL_S,
    )


async def rollback(channel: grpc.aio.Channel) -> None:
    stub = weights_pb2_grpc.WeightServiceStub(channel)
    await stub.Rollback(weights_pb2.RollbackRequest(version=types_pb2.WeightVersion()), timeout=CALL_S)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("final", [False, True])
async def test_logprobs_agree_with_transformers(
    channel: grpc.aio.Channel, models: list[PreTrainedModel], temperature: float, final: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    for length in (1, 33, 100):
        prompt = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        samples = await generate(channel, prompt, final=final, num_samples=3, max_tokens=40, temperature=temperature)
        assert len(samples) == 3
        for sample in samples:
            assert set(sample.steps) == {0}
            assert_sampled_from(models[:1], sample, temperature)


async def test_the_same_seed_gives_the_same_samples(channel: grpc.aio.Channel) -> None:
    first = await generate(channel, [7, 8], num_samples=2, max_tokens=20, seed=5, ignore_eos=True)
    again = await generate(channel, [7, 8], num_samples=2, max_tokens=20, seed=5, ignore_eos=True, final=True)
    assert [sample.tokens for sample in first] == [sample.tokens for sample in again]
    assert first[0].tokens != first[1].tokens
    (next_seed,) = await generate(channel, [7, 8], max_tokens=20, seed=6, ignore_eos=True)
    assert next_seed.tokens != first[1].tokens


async def test_seeded_requests_survive_a_crowd_of_long_prompts(channel: grpc.aio.Channel) -> None:
    # More prompt tokens than one engine step holds: a CPU generator could not be rewound for a prompt in parts.
    prompts = [[1 + (index + position) % 60 for position in range(450)] for index in range(24)]
    batches = await asyncio.gather(*(generate(channel, prompt, final=True, max_tokens=2, seed=1) for prompt in prompts))
    assert all(len(sample.tokens) <= 2 for samples in batches for sample in samples)
    assert len(await generate(channel, [7], max_tokens=3, ignore_eos=True)) == 1


async def test_stop_tokens_end_a_sample(channel: grpc.aio.Channel) -> None:
    (free,) = await generate(channel, [7], max_tokens=30, temperature=0, ignore_eos=True)
    stop = free.tokens[10]
    (stopped,) = await generate(channel, [7], max_tokens=30, temperature=0, stop_token_ids=[stop], ignore_eos=True)
    assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert stopped.finish_reason == policy_pb2.FINISH_REASON_STOP


async def ask(channel: grpc.aio.Channel, request: policy_pb2.GenerateRequest) -> list[policy_pb2.GenerateResponse]:
    stub = policy_pb2_grpc.PolicyServiceStub(channel)
    return [response async for response in stub.Generate(request, timeout=CALL_S)]


async def test_text_and_chat_are_rendered_and_answered_in_text(channel: grpc.aio.Channel) -> None:
    greedy = policy_pb2.SamplingParameters(temperature=0, max_tokens=12, ignore_eos=True)
    text = policy_pb2.GenerateRequest(text="w7 w8", sampling=greedy, return_text=True)
    responses = await ask(channel, text)
    assert list(responses[0].prompt_token_ids.ids) == [7, 8]
    tokens = [token for response in responses for token in response.token_ids]
    words = " ".join(f"w{token}" for token in tokens)
    assert "".join(response.text for response in responses).strip() == words
    message = types_pb2.ChatMessage(role="user", content="w9")
    chat = policy_pb2.GenerateRequest(chat=types_pb2.Chat(messages=[message]), sampling=greedy)
    assert list((await ask(channel, chat))[0].prompt_token_ids.ids) == [3, 9, 4]
    message.role = "alien"
    chat = policy_pb2.GenerateRequest(chat=types_pb2.Chat(messages=[message]))
    with pytest.raises(grpc.aio.AioRpcError, match="users only"):
        await ask(channel, chat)


async def test_stop_texts_end_a_sample(channel: grpc.aio.Channel) -> None:
    (free,) = await generate(channel, [7], max_tokens=30, temperature=0, ignore_eos=True)
    word = f"w{free.tokens[10]}"
    request = policy_pb2.GenerateRequest(
        prompt_token_ids=types_pb2.TokenIds(ids=[7]),
        sampling=policy_pb2.SamplingParameters(temperature=0, max_tokens=30, ignore_eos=True, stop=[word]),
        output_mode=policy_pb2.OUTPUT_MODE_FINAL,
    )
    (response,) = await ask(channel, request)
    assert response.finish_reason == policy_pb2.FINISH_REASON_STOP
    assert response.stop_reason == word
    assert list(response.token_ids) == free.tokens[: len(response.token_ids)]
    assert len(response.token_ids) < 30
    assert len(response.logprobs) == len(response.token_ids)


async def test_a_live_push_is_exact_for_every_token(
    channel: grpc.aio.Channel, folders: list[Path], models: list[PreTrainedModel]
) -> None:
    (before,) = await generate(channel, [7, 8, 9], max_tokens=20, temperature=0, ignore_eos=True)
    running = [
        asyncio.create_task(generate(channel, [10 + index], max_tokens=400, ignore_eos=True, final=index % 2 == 0))
        for index in range(6)
    ]
    await generate(channel, [5], max_tokens=4, ignore_eos=True)
    activation = await push(channel, folders[1], 1)
    assert activation.num_running_requests == 6
    for (sample,) in await asyncio.gather(*running):
        assert sample.finish_reason == policy_pb2.FINISH_REASON_LENGTH
        assert len(sample.tokens) == 400
        assert sample.steps == sorted(sample.steps)
        assert set(sample.steps) == {0, 1}
        assert_sampled_from(models, sample, 1.0)
    (after,) = await generate(channel, [7, 8, 9], max_tokens=20, temperature=0, ignore_eos=True)
    assert_sampled_from(models, after, 1.0)
    assert after.tokens != before.tokens
    await rollback(channel)
    (returned,) = await generate(channel, [7, 8, 9], max_tokens=20, temperature=0, ignore_eos=True)
    assert (returned.tokens, returned.logprobs) == (before.tokens, before.logprobs)


async def test_blocks_made_by_other_weights_are_not_found_again(
    channel: grpc.aio.Channel, folders: list[Path], models: list[PreTrainedModel]
) -> None:
    # Long enough for whole blocks in the prefix cache, which KEEP does not clear.
    prompt = [5 + position % 60 for position in range(130)]

    async def probe() -> Sample:
        (sample,) = await generate(channel, prompt, max_tokens=8, temperature=0, ignore_eos=True)
        return sample

    def run_on() -> asyncio.Task[list[Sample]]:
        return asyncio.create_task(generate(channel, prompt, max_tokens=380, ignore_eos=True))

    through_push = run_on()
    before = await probe()
    assert_sampled_from(models, before, 1.0)
    activation = await push(channel, folders[1], 2, weights_pb2.KV_CACHE_POLICY_KEEP)
    assert activation.num_running_requests == 1
    through_rollback = run_on()
    after = await probe()
    assert set(after.steps) == {2}
    assert_sampled_from([models[0], models[0], models[1]], after, 1.0)
    await rollback(channel)
    returned = await probe()
    assert (returned.tokens, returned.steps) == (before.tokens, [0] * 8)
    assert_sampled_from(models, returned, 1.0)
    for running, versions in ((through_push, ([0, 2], [0, 2, 0])), (through_rollback, ([2, 0],))):
        (sample,) = await running
        assert sample.finish_reason == policy_pb2.FINISH_REASON_LENGTH
        assert len(sample.steps) == 380
        assert [step for step, _ in groupby(sample.steps)] in versions


def test_a_missing_checkpoint_is_said_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "steersman.policy", "--model", str(tmp_path), "--port", "0"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 1
    assert f"model: is {str(tmp_path)!r}, which holds no config.json" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_model_that_vllm_loads_but_cannot_run_is_said_at_start(tmp_path: Path) -> None:
    shape = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # 16 for each head: no kernel on CPU
    config = LlamaConfig(vocab_size=VOCAB_SIZE, intermediate_size=64, num_hidden_layers=1, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    command = [
        sys.executable,
        "-m",
        "steersman.policy",
        "--model",
        str(tmp_path),
        "--kv-cache-mib",
        "32",
        "--port",
        "0",
    ]
    command += ["--max-model-len", "64", "--metrics-port", "0"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
    assert finished.returncode == 1
    assert (
        "cannot start: ENGINE_UNAVAILABLE: the engine loaded the model and died of its first token" in finished.stderr
    )


async def test_a_killed_engine_ends_the_server_and_its_calls(
    folders: list[Path], models: list[PreTrainedModel], tmp_path: Path
) -> None:
    with running(folders[0], tmp_path / "policy.log") as (process, address):
        (engine,) = psutil.Process(process.pid).children()
        async with grpc.aio.insecure_channel(address) as channel:
            call = asyncio.create_task(generate(channel, [7], max_tokens=500, ignore_eos=True))
            await generate(channel, [5], max_tokens=4, ignore_eos=True)
            engine.kill()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await asyncio.to_thread(process.wait, 60) == 1
