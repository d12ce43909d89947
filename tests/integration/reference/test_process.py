"""`python -m steersman.reference` as a real process with a tiny checkpoint."""

import asyncio
import os
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from transformers import Qwen2Config, Qwen2ForCausalLM

from steersman.cli.supervisor import free_port
from steersman.v1 import reference_pb2, reference_pb2_grpc
from steersman.wire.tensors import from_ragged, to_ragged

DEADLINE_S = 90


@asynccontextmanager
async def process(*flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [sys.executable, "-m", "steersman.reference", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    child = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, env=environment)
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def end(child: asyncio.subprocess.Process) -> tuple[int | None, str]:
    _, log = await asyncio.wait_for(child.communicate(), DEADLINE_S)
    return child.returncode, log.decode()


async def ready(channel: grpc.aio.Channel) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service="steersman.v1.ReferenceService"),
        wait_for_ready=True,
        timeout=DEADLINE_S,
    )
    async for response in watch:
        if response.status == health_pb2.HealthCheckResponse.SERVING:
            return


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.5,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


async def test_serves_a_checkpoint_and_drains_on_sigterm(checkpoint: Path) -> None:
    port, metrics_port = free_port(), free_port()
    flags = ["--model", str(checkpoint), "--port", str(port), "--metrics-port", str(metrics_port)]
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 50, 500, dtype=np.int32) for _ in range(256)]
    async with process(*flags) as child:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await ready(channel)
            stub = reference_pb2_grpc.ReferenceServiceStub(channel)
            model = (await stub.GetModel(reference_pb2.ReferenceServiceGetModelRequest(), timeout=30)).model
            assert model.name == "tiny"
            assert model.max_sequence_tokens == 512
            request = reference_pb2.ComputeLogprobsRequest(token_ids=to_ragged(rows, np.int32))
            pending = asyncio.ensure_future(stub.ComputeLogprobs(request, timeout=DEADLINE_S))
            url = f"http://127.0.0.1:{metrics_port}/metrics"
            in_flight = 'steersman_rpc_in_flight{method="ComputeLogprobs"} 1.0'
            async with asyncio.timeout(DEADLINE_S):
                while in_flight not in await asyncio.to_thread(_get, url) and not pending.done():
                    await asyncio.sleep(0.001)
            os.kill(child.pid, signal.SIGTERM)
            response = await pending
        status, log = await end(child)
    assert status == 0, log
    assert "Traceback" not in log
    logprobs = from_ragged(response.logprobs, "logprobs", np.float32)
    assert [len(row) for row in logprobs] == [499] * 256
    frozen = Qwen2ForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        ids = torch.from_numpy(rows[0].astype(np.int64))
        expected = frozen(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
    np.testing.assert_allclose(logprobs[0], expected.numpy(), atol=1e-4)


async def test_a_missing_checkpoint_is_named() -> None:
    async with process("--model", "/no/such/checkpoint", "--port", "0", "--metrics-port", "0") as child:
        status, log = await end(child)
    assert status == 1
    assert "model: is '/no/such/checkpoint', which does not exist" in log
    assert "Traceback" not in log


async def test_a_bad_flag_exits_with_usage() -> None:
    async with process("--model", "m", "--dtype", "int4") as child:
        status, log = await end(child)
    assert status == 2
    assert "dtype" in log


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read().decode()
