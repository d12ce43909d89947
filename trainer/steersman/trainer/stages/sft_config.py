"""The settings of the ``sft`` stage."""

from typing import Literal

from pydantic import Field

from steersman.trainer.stages.supervised_config import SupervisedConfig


class SftConfig(SupervisedConfig):
    """Settings of the ``sft`` stage. Comparisons serve as data too: their best response is the demonstration."""

    kind: Literal["sft"] = "sft"
    train_on_prompt: bool = Field(
        default=False, description="Also learn the tokens of the prompt, not the response alone."
    )
