"""Which stage a job kind runs. Names only: running a stage needs torch, which the service must not import."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from steersman.trainer.jobs.model import JobKind

if TYPE_CHECKING:
    from pydantic import BaseModel

    from steersman.trainer.stages.run import Run


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage by name: `package.module:ConfigClass` and `package.module:run_function`."""

    config: str
    run: str

    def load_config_class(self) -> "type[BaseModel]":
        """Imports the pydantic model of the stage's settings."""
        return _load(self.config)  # type: ignore[no-any-return]

    def load_run(self) -> "Callable[[Any, Run], object]":
        """Imports the function that runs the stage."""
        return _load(self.run)  # type: ignore[no-any-return]


Stages = Mapping[JobKind, Stage]

_STAGES: Final = "steersman.trainer.stages"

STAGES: Final[Stages] = {
    JobKind.SFT: Stage(config=f"{_STAGES}.sft_config:SftConfig", run=f"{_STAGES}.sft:run_sft"),
    JobKind.REWARD_MODEL: Stage(
        config=f"{_STAGES}.reward_model_config:RewardModelConfig", run=f"{_STAGES}.reward_model:run_reward_model"
    ),
    JobKind.PPO: Stage(config=f"{_STAGES}.ppo_config:PpoConfig", run=f"{_STAGES}.ppo:run_ppo"),
}


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
