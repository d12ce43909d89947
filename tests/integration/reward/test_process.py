"""`python -m steersman.reward` as a real process: a tiny model and a function, named in a file."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import torch
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from steersman.cli.supervisor import free_port
from steersman.v1 import reward_pb2, reward_pb2_grpc, types_pb2

DEADLINE_S = 90

RULES = """
import time
from pathlib import Path

def length(items):
    return [float(len(item.response)) for item in items]

def gated(items):
    folder = Path(items[0].context["folder"])
    (folder / "entered").touch()
    while not (folder / "answer").exists():
        time.sleep(0.01)
    return length(items)
"""


@asynccontextmanager
async def process(*flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [sys.executable, "-m", "steersman.reward", *flags]
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
        health_pb2.HealthCheckRequest(service="steersman.v1.RewardService"), wait_for_ready=True, timeout=DEADLINE_S
    )
    async for response in watch:
        if response.status == health_pb2.HealthCheckResponse.SERVING:
            return


async def exists(path: Path) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not path.exists():
            await asyncio.sleep(0.01)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.5,
        num_labels=1,
        reward_mean=1.0,
        reward_std=2.0,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "tiny")
    rules = tmp_path / "rules.py"
    rules.write_text(RULES)
    scorers = {
        "model": {"model": str(tmp_path / "tiny")},
        "length": {"function": f"{rules}:length"},
        "gated": {"function": f"{rules}:gated"},
    }
    path = tmp_path / "reward.yaml"
    path.write_text(yaml.safe_dump({"scorers": scorers, "default_scorer": "model", "metrics_port": 0}))
    return path


def item(response: str, **context: str) -> reward_pb2.ScoreItem:
    made = reward_pb2.ScoreItem(text=reward_pb2.TextPair(prompt="p", response=response))
    made.context.update(context)
    return made


async def test_serves_models_and_functions_and_drains_on_sigterm(config_file: Path, tmp_path: Path) -> None:
    port = free_port()
    async with process("--config", str(config_file), "--port", str(port)) as child:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await ready(channel)
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            listed = await stub.ListScorers(reward_pb2.ListScorersRequest(), timeout=30)
            assert [(found.name, found.is_default) for found in listed.scorers] == [
                ("gated", False),
                ("length", False),
                ("model", True),
            ]
            pair = reward_pb2.TokenPair(prompt=types_pb2.TokenIds(ids=[1, 2]), response=types_pb2.TokenIds(ids=[3, 4]))
            request = reward_pb2.ScoreRequest(
                items=[reward_pb2.ScoreItem(tokens=pair)], options=reward_pb2.ScoreOptions(include_raw=True)
            )
            (by_model,) = (await stub.Score(request, timeout=30)).results
            request = reward_pb2.ScoreRequest(items=[item("abc")], options=reward_pb2.ScoreOptions(scorer="length"))
            (by_length,) = (await stub.Score(request, timeout=30)).results
            request = reward_pb2.ScoreRequest(
                items=[item("abcd", folder=str(tmp_path))], options=reward_pb2.ScoreOptions(scorer="gated")
            )
            pending = asyncio.ensure_future(stub.Score(request, timeout=DEADLINE_S))
            await exists(tmp_path / "entered")
            os.kill(child.pid, signal.SIGTERM)
            (tmp_path / "answer").touch()
            (drained,) = (await pending).results
        status, log = await end(child)
    assert status == 0, log
    assert "Traceback" not in log
    model = Qwen2ForSequenceClassification.from_pretrained(tmp_path / "tiny")
    with torch.no_grad():
        raw = float(model(torch.tensor([[1, 2, 3, 4]])).logits)
    assert by_model.raw_score == pytest.approx(raw, abs=1e-5)
    assert by_model.score == pytest.approx((raw - 1.0) / 2.0, abs=1e-5)
    assert by_model.revision.startswith("sha256:")
    assert by_length.score == 3.0
    assert drained.score == 4.0


def save_tiny(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.5,
        num_labels=1,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(folder)


async def steersman(port: int, *arguments: str) -> str:
    """What the command says; it must succeed."""
    command = [sys.executable, "-m", "steersman.cli.main", *arguments, "--address", f"127.0.0.1:{port}"]
    child = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    said, complaints = await asyncio.wait_for(child.communicate(), DEADLINE_S)
    assert child.returncode == 0, complaints.decode()
    return said.decode()


async def test_the_command_scales_a_model_and_puts_it_in_place_of_another(tmp_path: Path) -> None:
    for seed, name in enumerate(("first", "second")):
        save_tiny(tmp_path / name, seed)
    rows = [{"prompt": [1, 2], "response": [token]} for token in range(3, 9)]
    (tmp_path / "reference.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"scorers": {"helpful": {"model": str(tmp_path / "first")}}, "models": {"roots": [str(tmp_path)]}}
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(settings | {"metrics_port": None}))
    port = free_port()
    async with process("--config", str(tmp_path / "reward.yaml"), "--port", str(port)) as child:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await ready(channel)
        await steersman(port, "rewards", "load", "trial", "second")
        scale = tmp_path / "second" / "reward_normalization.json"
        reference = str(tmp_path / "reference.jsonl")
        await steersman(port, "rewards", "normalize", reference, "--scorer", "trial", "-o", str(scale))
        await steersman(port, "rewards", "unload", "trial")
        load = ("rewards", "load", "next", "second", "--scorer", "helpful", "--switch", "--unload-previous")
        assert await steersman(port, *load) == "next is ready, and scorer helpful points to it\n"
        scored = await steersman(port, "score", "--input", reference, "--include-raw")
        os.kill(child.pid, signal.SIGTERM)
        status, log = await end(child)
    assert status == 0, log
    found = [json.loads(line) for line in scored.splitlines()]
    assert {row["model"] for row in found} == {"next"}
    values = json.loads(scale.read_text())
    assert [row["score"] for row in found] == pytest.approx(
        [(row["raw"] - values["mean"]) / values["std"] for row in found]
    )
    assert sum(row["score"] for row in found) == pytest.approx(0.0, abs=1e-4)


async def test_a_function_that_cannot_be_imported_is_named() -> None:
    async with process("--function", "no.such.module:f", "--port", "0", "--metrics-port", "0") as child:
        status, log = await end(child)
    assert status == 1
    assert "scorers.reward.function: is 'no.such.module:f', which cannot be imported" in log
    assert "Traceback" not in log
