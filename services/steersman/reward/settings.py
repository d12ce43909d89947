"""Settings of the reward server: named scorers, each a model or a Python function.

    scorers:
      quality: {model: /models/quality-7b, dtype: bfloat16}
      length: {function: "my_rewards.rules:length"}
    default_scorer: quality

One scorer alone can be given by flag: `--model PATH` or `--function MODULE:NAME`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from steersman.serving.batching import BatchingSettings
from steersman.serving.settings import ServerSettings

# Name of the scorer that --model or --function makes.
ONLY_SCORER = "reward"


class ModelScorerSettings(BaseModel):
    """A scalar-head model."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field(min_length=1, description="Checkpoint folder in Hugging Face layout, or hub id.")
    revision: str | None = Field(default=None, description="Hub revision. Default: the newest.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="What the model computes in. Default: the dtype of the checkpoint."
    )
    device: str = Field(default="auto", description="Torch device. Default: the first GPU, else the CPU.")
    max_sequence_tokens: int | None = Field(
        default=None, ge=1, description="Longest item accepted, in tokens. Default: what the model can."
    )
    encoding: Literal["auto", "template", "continuation"] = Field(
        default="auto",
        description="How text and chat become tokens; see steersman.reward.text. Default: what `reward_encoding` "
        "in the model's configuration says, else template.",
    )
    batching: BatchingSettings = Field(default_factory=BatchingSettings, description="Batching across callers.")


class FunctionScorerSettings(BaseModel):
    """A Python scoring function; see steersman.reward.plugin."""

    model_config = ConfigDict(extra="forbid")

    function: str = Field(
        pattern=r"^[^:]+:[A-Za-z_][\w.]*$", description='"package.module:function" or "/path/to/file.py:function".'
    )
    tokenizer: str | None = Field(
        default=None, description="Folder or hub id of the tokenizer that turns token ids into text for it."
    )
    timeout_seconds: float = Field(default=30.0, gt=0, le=3600, description="Time for one call, in seconds.")
    max_batch_items: int = Field(default=64, ge=1, le=1024, description="Items of one call.")
    max_concurrency: int = Field(default=4, ge=1, le=256, description="Calls at a time, each on a thread of its own.")
    max_queue_items: int = Field(default=8192, ge=1, description="Waiting items; more are refused (QUEUE_FULL).")


def _kind(value: Any) -> str:
    """Which of the two a scorer is meant to be, so that only the errors of that one are told."""
    if isinstance(value, FunctionScorerSettings) or (isinstance(value, dict) and "function" in value):
        return "function"
    return "model"


ScorerSettings = Annotated[
    Annotated[ModelScorerSettings, Tag("model")] | Annotated[FunctionScorerSettings, Tag("function")],
    Discriminator(_kind),
]


class RewardSettings(ServerSettings):
    """Scores of responses by reward models and Python functions, over gRPC."""

    port: int = Field(50053, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    metrics_port: int | None = Field(
        9053, ge=0, le=65535, description="Port of the Prometheus endpoint; 0 takes a free one, none is off."
    )
    scorers: dict[str, ScorerSettings] = Field(
        default_factory=dict, description="Scorers by name: {model: PATH, ...} or {function: MODULE:NAME, ...}."
    )
    model: str | None = Field(None, description=f"One model as the only scorer, called {ONLY_SCORER!r}.")
    function: str | None = Field(None, description=f"One function as the only scorer, called {ONLY_SCORER!r}.")
    default_scorer: str | None = Field(
        None, description="Scorer of requests that name none. Default: the first of scorers."
    )
    num_threads: int | None = Field(
        None, ge=1, le=1024, description="Threads of a CPU operation. Default: OMP_NUM_THREADS, else physical cores."
    )
    stall_seconds: float = Field(
        300.0, gt=0, description="Unhealthy when one batch takes longer than this, in seconds."
    )

    @model_validator(mode="after")
    def _scorers_are_named_once(self) -> Self:
        given = [name for name in ("scorers", "model", "function") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"scorers: given by {given or 'nothing'}, allowed: exactly one of scorers, model, function"
            )
        if "" in self.scorers:
            raise ValueError("scorers: has an empty name, allowed: names of at least one character")
        names = list(self.named_scorers())
        if self.default_scorer is not None and self.default_scorer not in names:
            raise ValueError(f"default_scorer: is {self.default_scorer!r}, allowed: {', '.join(names)}")
        return self

    def named_scorers(self) -> dict[str, ModelScorerSettings | FunctionScorerSettings]:
        """All scorers by name, however they were given."""
        if self.model is not None:
            return {ONLY_SCORER: ModelScorerSettings(model=self.model)}
        if self.function is not None:
            return {ONLY_SCORER: FunctionScorerSettings(function=self.function)}
        return dict(self.scorers)
