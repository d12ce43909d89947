"""A model that could not be saved with its tokenizer is refused by every stage before it trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steersman.trainer.checkpoint.atomic import CheckpointError
from steersman.trainer.checkpoint.source import ModelSource
from steersman.trainer.stages.ppo import run_ppo
from steersman.trainer.stages.ppo_config import PpoConfig
from steersman.trainer.stages.reward_model import run_reward_model
from steersman.trainer.stages.reward_model_config import RewardModelConfig
from steersman.trainer.stages.run import Run
from steersman.trainer.stages.sft import run_sft
from steersman.trainer.stages.sft_config import SftConfig


@pytest.mark.parametrize(
    ("settings_type", "run_stage", "model", "data"),
    [
        (SftConfig, run_sft, "model", "data"),
        (RewardModelConfig, run_reward_model, "model", "data"),
        (PpoConfig, run_ppo, "actor", "prompts"),
    ],
)
def test_it_is_refused_before_it_trains(
    settings_type: type[Any],
    run_stage: Callable[[Any, Run], object],
    model: str,
    data: str,
    tiny_model: ModelSource,
    tiny_tokenizer: str,
    tmp_path: Path,
    write_rows: Callable[..., str],
) -> None:
    assert tiny_model.config is not None
    rows = [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}] * 4
    settings = {
        # The class that this architecture forces on its tokenizer splits words otherwise.
        model: {"config": {**tiny_model.config, "model_type": "qwen2"}},
        data: {"files": [write_rows(rows)]},
        "tokenizer": tiny_tokenizer,
        "max_prompt_tokens": 8,
        "device": "cpu",
    }
    if settings_type is not PpoConfig:
        settings["max_response_tokens"] = 8
    config = settings_type.model_validate(settings)
    with Run(tmp_path / "run", run_id="test") as run, pytest.raises(CheckpointError, match="Qwen2Tokenizer"):
        run_stage(config, run)
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()
