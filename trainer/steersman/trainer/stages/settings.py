"""Settings that several stages have. Settings import neither torch nor transformers: the service checks them too."""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

# Beyond any training; a number that no counter on the wire could hold would fail only later.
MAX_STEPS: Final = 10**9
# What torch takes as a seed and every language as an integer.
MAX_SEED: Final = 2**63 - 1

DTypeSetting = Literal["auto", "float32", "bfloat16"]

PatienceSetting = Annotated[
    float,
    Field(
        gt=0,
        description="Of several processes: one that gives no sign for so long ends the job, and so does one that lives "
        "when none has got on for longer; 1,800 s more before the first forward pass, and 600 s more while files are "
        "written or checked. More than a forward and backward pass of a micro-batch takes.",
    ),
]
RANK_PATIENCE_SECONDS: Final = 120.0


class OptimizerConfig(BaseModel):
    """AdamW with a warm-up and a schedule; a step is one update of the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(default=1e-5, gt=0, description="Highest learning rate, reached after the warm-up.")
    schedule: Literal["constant", "linear", "cosine"] = Field(default="cosine", description="After the warm-up.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps over which the rate rises from zero in a line.")
    final_share: float = Field(default=0.0, ge=0, le=1, description="Share of learning_rate left at the last step.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled; on matrices only.")
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="Clip the global gradient norm; null: never.")
