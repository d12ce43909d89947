"""Settings are checked elsewhere, and every bad one is named with its path."""

import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from steersman.trainer.jobs.model import JobKind
from steersman.trainer.jobs.registry import Stage
from steersman.trainer.jobs.validation import ProcessValidator, find_violations
from steersman.wire.errors import Reason, SteersmanError


class Optimizer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    learning_rate: float = Field(1e-3, gt=0)


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str
    optimizer: Optimizer = Optimizer()


PROGRAM = """
import sys
from pydantic import BaseModel
from steersman.trainer.jobs import validation
from steersman.trainer.jobs.model import JobKind
from steersman.trainer.jobs.registry import Stage

class Config(BaseModel, extra="forbid"):
    steps: int

sys.exit(validation.main({JobKind.SFT: Stage(config="__main__:Config", run="")}))
"""


def test_every_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stage, "load_config_class", lambda stage: Config)
    stages = {JobKind.SFT: Stage(config="", run="")}
    assert find_violations(stages, JobKind.SFT, {"model": "m", "optimizer": {"learning_rate": 0.1}}) == []
    bad = {"optimizer": {"learning_rate": -1, "momentum": 2}}
    found = {v.field: v.description for v in find_violations(stages, JobKind.SFT, bad)}
    assert found["spec.config.model"] == "is required"
    assert found["spec.config.optimizer.momentum"] == "is no setting of this kind of job"
    assert found["spec.config.optimizer.learning_rate"].startswith("is -1: Input should be greater than 0")


async def test_a_process_answers(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text(PROGRAM)
    validator = ProcessValidator((sys.executable, str(script)))
    await validator.check(JobKind.SFT, {"steps": 3})
    with pytest.raises(SteersmanError, match=r"spec\.config\.steps is 'x'") as caught:
        await validator.check(JobKind.SFT, {"steps": "x"})
    assert caught.value.reason is Reason.INVALID_FIELD
    assert [violation.field for violation in caught.value.violations] == ["spec.config.steps"]


async def test_a_process_that_cannot_answer_is_said_so() -> None:
    validator = ProcessValidator((sys.executable, "-c", "raise SystemExit('no torch here')"))
    with pytest.raises(SteersmanError, match="no torch here") as caught:
        await validator.check(JobKind.SFT, {})
    assert caught.value.reason is Reason.ENGINE_UNAVAILABLE
