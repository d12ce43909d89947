"""The job files that people copy are valid."""

from importlib import import_module
from pathlib import Path

import pytest
import yaml

JOBS = Path(__file__).resolve().parents[3] / "examples" / "jobs"
CONFIGS = {
    "sft": ("steersman.trainer.stages.sft_config", "SftConfig"),
    "reward_model": ("steersman.trainer.stages.reward_model_config", "RewardModelConfig"),
    "ppo": ("steersman.trainer.stages.ppo_config", "PpoConfig"),
}


def test_there_is_one_of_each_kind() -> None:
    assert {path.stem for path in JOBS.glob("*.yaml")} == set(CONFIGS)


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_valid(kind: str) -> None:
    module, name = CONFIGS[kind]
    values = yaml.safe_load((JOBS / f"{kind}.yaml").read_text())
    assert getattr(import_module(module), name).model_validate(values)
