"""One checkpoint on both backends of a real reward server, real vLLM on CPU: the same raw scores from the two."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from steersman.cli.supervisor import free_port
from steersman.client import AsyncRewardClient, HealthClient, ScoreItem

DEADLINE_S = 240
VOCAB = 200

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        num_labels=1,
        reward_mean=0.5,
        reward_std=2.0,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "tiny")
    model = {"model": str(tmp_path / "tiny"), "dtype": "float32"}
    scorers = {"torch": model, "vllm": model | {"backend": "vllm", "vllm": {"cache_mib": 16}}}
    path = tmp_path / "reward.yaml"
    path.write_text(yaml.safe_dump({"scorers": scorers, "metrics_port": None, "port": free_port()}))
    return path


def items() -> list[ScoreItem]:
    """Prompts with several responses, and strangers, some of them shorter than a block of vLLM's cache."""
    rng = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return rng.integers(1, VOCAB, count).tolist()

    prompts = [ids(length) for length in (100, 37, 3)]
    responses = [(prompt, ids(length)) for prompt in prompts for length in (1, 2, 31, 64, 100)]
    return [ScoreItem(prompt=prompt, response=response) for prompt, response in responses]


async def test_both_backends_give_the_same_raw_scores(config_file: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "steersman.reward", "--config", str(config_file), env=environment
    )
    try:
        target = f"127.0.0.1:{yaml.safe_load(config_file.read_text())['port']}"
        with HealthClient(target) as health:
            await asyncio.to_thread(health.wait_until_serving, timeout=DEADLINE_S)
        async with AsyncRewardClient(target) as client:
            plain = await client.score(items(), scorer="torch", include_raw=True)
            first = await client.score(items(), scorer="vllm", include_raw=True)
            # The second time everything is in the prefix cache.
            again = await client.score(items(), scorer="vllm", include_raw=True)
        expected = [score.raw for score in plain]
        np.testing.assert_allclose([score.raw for score in first], expected, atol=1e-4)
        np.testing.assert_allclose([score.raw for score in again], expected, atol=1e-4)
        np.testing.assert_allclose([score.value for score in first], [score.value for score in plain], atol=1e-4)
        assert {score.revision for score in first} == {score.revision for score in plain}
        # An activation would squash them between 0 and 1.
        assert min(expected) < 0 or max(expected) > 1

        engines = psutil.Process(child.pid).children(recursive=True)
        assert engines
        child.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(child.wait(), DEADLINE_S) == 0
        _, alive = await asyncio.to_thread(psutil.wait_procs, engines, timeout=30)
        assert not alive
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
