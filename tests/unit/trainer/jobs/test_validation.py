"""Every bad setting is named with its path, and checking costs no heavy import."""

import subprocess
import sys

import pytest
from pydantic import BaseModel, ConfigDict, Field

from steersman.trainer.jobs.model import JobKind
from steersman.trainer.jobs.registry import STAGES, Stage
from steersman.trainer.jobs.validation import SettingsValidator, find_violations
from steersman.wire.errors import Reason, SteersmanError


class Optimizer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    learning_rate: float = Field(1e-3, gt=0)


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str
    optimizer: Optimizer = Optimizer()


def test_every_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stage, "load_config_class", lambda stage: Config)
    stages = {JobKind.SFT: Stage(config="", run="")}
    assert find_violations(stages, JobKind.SFT, {"model": "m", "optimizer": {"learning_rate": 0.1}}) == []
    bad = {"optimizer": {"learning_rate": -1, "momentum": 2}}
    found = {v.field: v.description for v in find_violations(stages, JobKind.SFT, bad)}
    assert found["spec.config.model"] == "is required"
    assert found["spec.config.optimizer.momentum"] == "is no setting of this kind of job"
    assert found["spec.config.optimizer.learning_rate"].startswith("is -1: Input should be greater than 0")


async def test_bad_settings_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stage, "load_config_class", lambda stage: Config)
    validator = SettingsValidator({JobKind.SFT: Stage(config="", run="")})
    await validator.check(JobKind.SFT, {"model": "m"})
    with pytest.raises(SteersmanError, match=r"spec\.config\.model is 3") as caught:
        await validator.check(JobKind.SFT, {"model": 3})
    assert caught.value.reason is Reason.INVALID_FIELD
    assert [violation.field for violation in caught.value.violations] == ["spec.config.model"]


def test_the_service_and_its_checks_import_nothing_heavy() -> None:
    program = """
import sys
import steersman.trainer.jobs.__main__
from steersman.trainer.jobs.registry import STAGES
for stage in STAGES.values():
    stage.load_config_class()
heavy = {"torch", "transformers", "tokenizers", "safetensors", "pyarrow", "numpy", "vllm"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("kind", "config", "field"),
    [
        (JobKind.SFT, {"max_steps": 2**63}, "max_steps"),
        (JobKind.REWARD_MODEL, {"num_epochs": 1e300}, "num_epochs"),
        (JobKind.SFT, {"seed": 2**63}, "seed"),
        (JobKind.PPO, {"total_steps": 1e300}, "total_steps"),
        (JobKind.PPO, {"seed": -1}, "seed"),
    ],
)
def test_numbers_that_no_counter_holds_are_refused(kind: JobKind, config: dict[str, object], field: str) -> None:
    found = {violation.field for violation in find_violations(STAGES, kind, config)}
    assert f"spec.config.{field}" in found
