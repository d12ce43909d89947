"""Settings of the reward server: named scorers, each a model, a Python function, or an ensemble of others.

    scorers:
      quality: {model: /models/quality-7b, dtype: bfloat16}
      length: {function: "my_rewards.rules:length"}
      careful: {ensemble: [quality, length], combine: min}
    default_scorer: quality

One scorer alone can be given by flag: `--model PATH` or `--function MODULE:NAME`.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from steersman.serving.batching import BatchingSettings
from steersman.serving.settings import ServerSettings

# Name of the scorer that --model or --function makes.
ONLY_SCORER = "reward"


class LengthPenaltySettings(BaseModel):
    """Subtracts from a score, after normalisation, for the tokens of the response beyond some that are free."""

    model_config = ConfigDict(extra="forbid")

    per_token: float = Field(gt=0, allow_inf_nan=False, description="Subtracted for each token beyond the free ones.")
    free_tokens: int = Field(default=0, ge=0, description="Response tokens that cost nothing.")

    def of(self, num_response_tokens: int) -> float:
        """What a response of so many tokens costs, at least 0."""
        return self.per_token * max(0, num_response_tokens - self.free_tokens)


class VllmBackendSettings(BaseModel):
    """What the vLLM backend may take of the machine."""

    model_config = ConfigDict(extra="forbid")

    cache_mib: int | None = Field(
        default=None,
        ge=1,
        description="Key-value cache, in MiB. Default: 512 on a CPU, what is left on an accelerator.",
    )
    gpu_memory_fraction: float = Field(
        default=0.9, gt=0, le=1, description="Share of a GPU's memory that it may use in all."
    )


class ModelScorerSettings(BaseModel):
    """A scalar-head model."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field(min_length=1, description="Checkpoint folder in Hugging Face layout, or hub id.")
    revision: str | None = Field(default=None, description="Hub revision. Default: the newest.")
    backend: Literal["torch", "vllm"] = Field(
        default="torch",
        description="What runs it: torch, or vLLM's pooling runner, in a process of its own. Raw scores are the same.",
    )
    vllm: VllmBackendSettings = Field(
        default_factory=VllmBackendSettings, description="For the vllm backend; the other one ignores it."
    )
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
    normalize: Literal["auto", "off"] = Field(
        default="auto",
        description="Shift and scale scores as `reward_normalization.json` beside the model says, else as "
        "`reward_mean` and `reward_std` in its configuration do; a model without either, or off: raw scores.",
    )
    length_penalty: LengthPenaltySettings | None = Field(
        default=None, description="Penalty for long responses. Default: none."
    )
    cache_items: int = Field(
        default=0, ge=0, description="Scores kept by their exact token ids, least recently used out first; 0: none."
    )
    share_prefixes: bool = Field(
        default=True,
        description="Compute once what items of a batch begin with in common (a prompt with several responses), "
        "where the model allows it.",
    )
    num_workers: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Batches that the torch backend computes side by side, each with its share of num_threads. "
        "Default: one for each thread, at most 4, on a CPU; 1 on an accelerator.",
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
    length_penalty: LengthPenaltySettings | None = Field(
        default=None, description="Penalty for long responses, in tokens of `tokenizer`. Default: none."
    )
    timeout_seconds: float = Field(default=30.0, gt=0, le=3600, description="Time for one call, in seconds.")
    max_batch_items: int = Field(default=64, ge=1, le=1024, description="Items of one call.")
    max_concurrency: int = Field(default=4, ge=1, le=256, description="Calls at a time, each on a thread of its own.")
    max_queue_items: int = Field(default=8192, ge=1, description="Waiting items; more are refused (QUEUE_FULL).")

    @model_validator(mode="after")
    def _tokens_can_be_counted(self) -> Self:
        if self.length_penalty is not None and self.tokenizer is None:
            raise ValueError("length_penalty: needs a tokenizer that says what a token is; none is given")
        return self


class EnsembleSettings(BaseModel):
    """Several scorers combined; see steersman.reward.ensemble."""

    model_config = ConfigDict(extra="forbid")

    ensemble: list[str] = Field(min_length=2, max_length=64, description="Names of the scorers it combines.")
    combine: Literal["mean", "min", "uncertainty"] = Field(
        default="mean", description="Weighted mean, worst member, or weighted mean less `beta` times the dispersion."
    )
    weights: dict[str, float] = Field(
        default_factory=dict, description="Weight of each member for mean and uncertainty. Default: all the same."
    )
    beta: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="How much dispersion costs (uncertainty).")
    dispersion: Literal["std", "variance"] = Field(
        default="std", description="Of the members' scores: standard deviation, or variance as in arXiv:2310.02743."
    )
    max_failed_members: int = Field(
        default=0, ge=0, description="So many may fail, and are left out. More fail the item. Default: none may."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = self.ensemble
        if len(set(names)) < len(names):
            raise ValueError(f"ensemble: names {names} twice the same, allowed: each scorer once")
        if self.weights and (set(self.weights) != set(names) or self.combine == "min"):
            raise ValueError(f"weights: are for {sorted(self.weights)}, allowed: one for each of {names}; none for min")
        if any(not 0 < weight < math.inf for weight in self.weights.values()):
            raise ValueError(f"weights: are {self.weights}, allowed: finite numbers above 0")
        if self.max_failed_members >= len(names):
            raise ValueError(f"max_failed_members: is {self.max_failed_members}, allowed: 0 to {len(names) - 1}")
        return self


def _kind(value: Any) -> str:
    """Which of them a scorer is meant to be, so that only the errors of that one are told."""
    for kind, settings in (("function", FunctionScorerSettings), ("ensemble", EnsembleSettings)):
        if isinstance(value, settings) or (isinstance(value, dict) and kind in value):
            return kind
    return "model"


ScorerSettings = Annotated[
    Annotated[ModelScorerSettings, Tag("model")]
    | Annotated[FunctionScorerSettings, Tag("function")]
    | Annotated[EnsembleSettings, Tag("ensemble")],
    Discriminator(_kind),
]


class LiveModelsSettings(BaseModel):
    """Models that callers may load and unload while the server serves."""

    model_config = ConfigDict(extra="forbid")

    roots: list[Path] = Field(
        default_factory=list,
        description="Folders below which callers may have models loaded. Default: none, so no folder can be named.",
    )
    hub_ids: list[str] = Field(
        default_factory=list,
        description="Hub models that callers may have loaded: `name/of-one`, or `name/*` for all of one name.",
    )
    max_models: int = Field(default=4, ge=1, le=1024, description="Models held at once, those of scorers included.")
    memory_reserve: float = Field(
        default=0.1, ge=0, lt=1, description="Share of free memory that a load by request must leave free."
    )
    load_seconds: float = Field(default=1800.0, gt=0, le=86400, description="Time for one load, in seconds.")
    drain_seconds: float = Field(
        default=300.0, gt=0, le=86400, description="Time for the items of a model that is unloaded, in seconds."
    )


class RewardSettings(ServerSettings):
    """Scores of responses by reward models and Python functions, over gRPC."""

    port: int = Field(50053, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    metrics_port: int | None = Field(
        9053, ge=0, le=65535, description="Port of the Prometheus endpoint; 0 takes a free one, none is off."
    )
    scorers: dict[str, ScorerSettings] = Field(
        default_factory=dict,
        description="Scorers by name: {model: PATH, ...}, {function: MODULE:NAME, ...} or {ensemble: [NAME], ...}.",
    )
    model: str | None = Field(None, description=f"One model as the only scorer, called {ONLY_SCORER!r}.")
    function: str | None = Field(None, description=f"One function as the only scorer, called {ONLY_SCORER!r}.")
    default_scorer: str | None = Field(
        None, description="Scorer of requests that name none. Default: the first of scorers."
    )
    models: LiveModelsSettings = Field(
        default_factory=LiveModelsSettings, description="Loading and unloading while serving."
    )
    http_port: int | None = Field(
        None, ge=0, le=65535, description="Port of the HTTP front; 0 takes a free one, none is off."
    )
    http_timeout_seconds: float = Field(
        600.0, gt=0, le=86400, description="Time for one call over HTTP, in seconds; gRPC callers send a deadline."
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

    @model_validator(mode="after")
    def _members_are_scorers(self) -> Self:
        allowed = [name for name, scorer in self.scorers.items() if not isinstance(scorer, EnsembleSettings)]
        for name, scorer in self.scorers.items():
            unknown = [member for member in getattr(scorer, "ensemble", ()) if member not in allowed]
            if unknown:
                raise ValueError(f"scorers.{name}.ensemble: has {unknown[0]!r}, allowed: {', '.join(allowed)}")
        return self

    def uses_vllm(self) -> bool:
        """Whether any scorer runs on vLLM."""
        return any(getattr(scorer, "backend", None) == "vllm" for scorer in self.named_scorers().values())

    def named_scorers(self) -> dict[str, ModelScorerSettings | FunctionScorerSettings | EnsembleSettings]:
        """All scorers by name, however they were given."""
        if self.model is not None:
            return {ONLY_SCORER: ModelScorerSettings(model=self.model)}
        if self.function is not None:
            return {ONLY_SCORER: FunctionScorerSettings(function=self.function)}
        return dict(self.scorers)
