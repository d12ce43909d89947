"""The settings of the ``reward_model`` stage."""

from typing import Literal

from pydantic import Field

from steersman.trainer.stages.supervised_config import SupervisedConfig


class RewardModelConfig(SupervisedConfig):
    """Settings of the ``reward_model`` stage; ``batch_size`` counts comparisons, however many responses each ranks."""

    kind: Literal["reward_model"] = "reward_model"
    use_margins: bool = Field(default=True, description="Where rows have a margin, ask for that much of a gap.")
    use_ties: bool = Field(default=False, description="Let tied responses pull their scores together.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="Assumed share of wrong labels.")
    balance_lengths: bool = Field(
        default=False,
        description="Show comparisons in which the rarer of the longer and the shorter response is preferred again, "
        "until both are as many: length alone then tells nothing.",
    )
    score_penalty: float = Field(
        default=0.0, ge=0, description="Weight of the squared score in the loss: keeps scores near zero."
    )
    normalize_on: Literal["chosen", "all", "none"] = Field(
        default="chosen",
        description="Training responses whose scores get mean 0 and deviation 1, in `reward_normalization.json` beside "
        "the model: the best of each comparison, all, or no normalisation.",
    )
