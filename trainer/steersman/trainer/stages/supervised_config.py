"""What the settings of the supervised stages have in common."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steersman.trainer.checkpoint.source import ModelSource
from steersman.trainer.data.order import EpochOrder, split_indices
from steersman.trainer.data.settings import DataSettings, TranscriptTemplate
from steersman.trainer.stages.settings import (
    MAX_SEED,
    MAX_STEPS,
    RANK_PATIENCE_SECONDS,
    DTypeSetting,
    OptimizerConfig,
    PatienceSetting,
)


class SupervisedConfig(BaseModel):
    """What the supervised stages have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelSource
    tokenizer: str | None = Field(default=None, description="Directory or hub id; model.path if left out.")
    data: DataSettings
    eval_data: DataSettings | None = Field(default=None, description="Held-out data of its own.")
    eval_share: float = Field(
        default=0.0, ge=0, lt=1, description="Share of data that is held out for evaluation, drawn by the seed."
    )
    transcript: TranscriptTemplate = Field(default_factory=TranscriptTemplate)
    max_prompt_tokens: int = Field(default=512, ge=1, description="Longer prompts lose their oldest tokens.")
    max_response_tokens: int = Field(default=512, ge=1, description="EOS counted; longer responses lose their end.")

    batch_size: int = Field(default=32, ge=1, description="Records in one update.")
    micro_batch_tokens: int = Field(default=8192, ge=1, description="Tokens in one forward pass, with padding.")
    num_epochs: float = Field(default=1.0, gt=0, le=1e6, description="Passes over the data, if max_steps is left out.")
    max_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS, description="Updates in all.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    seed: int = Field(
        default=0, ge=0, le=MAX_SEED, description="Decides fresh weights, the held-out share and the order of the data."
    )
    device: str = Field(default="auto", description="auto (CUDA if there), cpu, cuda or cuda:N.")
    dtype: DTypeSetting = Field(
        default="auto", description="Type of the matrix products; weights stay float32. auto: bfloat16 on CUDA."
    )

    log_every_steps: int = Field(default=10, ge=1)
    eval_every_steps: int = Field(default=0, ge=0, description="0: at the end only.")
    save_every_steps: int = Field(default=100, ge=0, description="0: when stopped only.")
    keep_checkpoints: int = Field(default=2, ge=1)
    rank_patience_seconds: PatienceSetting = RANK_PATIENCE_SECONDS

    @model_validator(mode="after")
    def _consistent(self) -> "SupervisedConfig":
        if self.tokenizer is None and self.model.path is None:
            raise ValueError("tokenizer is missing: a model from scratch has none of its own")
        if self.eval_data is not None and self.eval_share:
            raise ValueError("give eval_data or eval_share, not both")
        return self

    def total_steps(self, num_records: int) -> int:
        """Updates in all."""
        if self.max_steps is not None:
            return self.max_steps
        order = EpochOrder(num_records, batch_size=self.batch_size, seed=self.seed)
        return max(1, round(order.steps_per_epoch * self.num_epochs))

    def held_out(self, num_records: int) -> tuple[list[int], list[int]]:
        """Record numbers to train on, and those of ``eval_share``: at least one if any is asked for."""
        held_out = max(1, round(num_records * self.eval_share)) if self.eval_share else 0
        return split_indices(num_records, held_out=held_out, seed=self.seed)
