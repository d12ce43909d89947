"""`steersman rewards check` from end to end: the real stage, the real server on what it saved, the command."""

import asyncio
import json
import os
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from steersman.cli.main import app
from steersman.cli.supervisor import free_port
from steersman.trainer.checkpoint.source import ModelSource
from steersman.trainer.data.settings import DataSettings
from steersman.trainer.stages.reward_model import run_reward_model
from steersman.trainer.stages.reward_model_config import RewardModelConfig
from steersman.trainer.stages.run import Run
from steersman.trainer.stages.settings import OptimizerConfig

DEADLINE_S = 90


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a short training; `w3` is better than `w4`."""
    folder = tmp_path_factory.mktemp("runs")
    vocabulary = ["<pad>", "<eos>", "<unk>", *(f"w{n}" for n in range(29))]
    core = Tokenizer(WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    ).save_pretrained(folder / "tokenizer")
    generator = random.Random(3)
    rows = []
    for _ in range(60):
        prompt, tail = (" ".join(generator.choices(vocabulary[8:], k=generator.randint(1, 6))) for _ in range(2))
        rows.append({"prompt": prompt, "chosen": f"w3 {tail}", "rejected": f"w4 {tail}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RewardModelConfig(
        model=ModelSource(
            config={
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 64,
            }
        ),
        tokenizer=str(folder / "tokenizer"),
        data=DataSettings(files=(str(folder / "rows.jsonl"),)),
        eval_share=0.25,
        max_prompt_tokens=8,
        max_response_tokens=12,
        batch_size=16,
        micro_batch_tokens=400,
        max_steps=12,
        optimizer=OptimizerConfig(learning_rate=0.02),
        device="cpu",
    )
    with Run(folder / "run", run_id="check") as run:
        run_reward_model(config, run)
    return folder / "run"


@pytest.fixture
async def address(trained: Path, tmp_path: Path) -> AsyncIterator[str]:
    """A server process with the model, in two data types."""
    port, config = free_port(), tmp_path / "reward.yaml"
    model = str(trained / "model")
    scorers = {"trained": {"model": model}, "coarse": {"model": model, "dtype": "bfloat16"}}
    config.write_text(yaml.safe_dump({"scorers": scorers, "default_scorer": "trained", "metrics_port": 0}))
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "steersman.reward", "--config", str(config), "--port", str(port)),
        stderr=asyncio.subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service="steersman.v1.RewardService"),
                wait_for_ready=True,
                timeout=DEADLINE_S,
            )
            async for response in watch:
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        yield f"127.0.0.1:{port}"
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def test_what_is_served_is_what_was_trained(trained: Path, address: str, tmp_path: Path) -> None:
    async def check(*arguments: str | Path) -> Result:
        command = ["rewards", "check", *map(str, arguments), "--address", address]
        return await asyncio.to_thread(CliRunner().invoke, app, command)

    for path in (trained, trained / "scores.json", trained / "model"):
        good = await check(path)
        assert good.exit_code == 0, good.output
        assert f"{address}: trained (float32, sha256:" in good.stdout
        assert good.stdout.endswith("allowed: 0.001\n")
    coarse = await check(trained, "--scorer", "coarse")
    assert coarse.exit_code == 0, coarse.output
    assert "(bfloat16, " in coarse.stdout
    strict = await check(trained, "--scorer", "coarse", "--tolerance", "1e-9")
    assert strict.exit_code == 1

    content = json.loads((trained / "scores.json").read_text())
    content["items"][5]["raw_score"] += 0.5
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    wrong = await check(other)
    assert wrong.exit_code == 1
    assert "is 0.5, at items[5]; allowed: 0.001" in wrong.stdout
    assert f"scores are not those of the training at {address}" in wrong.stderr

    for text, part in (("{", "is not JSON"), ('{"items": []}', "has no items"), ('{"items": [1]}', "items[0]")):
        other.write_text(text)
        refused = await check(other)
        assert refused.exit_code == 2
        assert part in refused.stderr
    assert "scores.json: cannot be read" in (await check(tmp_path)).stderr
