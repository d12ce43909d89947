"""The file that a pipeline is described by. Unknown keys are refused.

`sft`, `reward_model` and `ppo` are settings of the jobs as `docs/configuration.md` names them, less what the pipeline
itself knows: paths of data and models, the tokenizer, and addresses.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LanguageSource(_Settings):
    """Data of the generated language, compared by the simulated annotator."""

    kind: Literal["language"]
    num_demonstrations: int = Field(default=8000, ge=1)
    held_out_questions: int = Field(default=256, ge=1, description="Questions that no training sees.")
    num_comparisons: int = Field(default=1500, ge=1, description="Pairs that the annotator compares for training.")
    num_held_out_comparisons: int = Field(default=300, ge=1, description="Pairs that only measure the reward model.")
    annotator_temperature: float = Field(
        default=0.5, gt=0, description="Noise of the annotator: 0.5 errs on 12 % of the pairs that differ by one."
    )


class ComparisonSource(_Settings):
    """Human comparisons in a file of the HH form (`chosen` and `rejected` transcripts)."""

    kind: Literal["comparisons"]
    path: Path | None = Field(default=None, description="The file; --data gives it too.")
    held_out_share: float = Field(default=0.12, gt=0, lt=1, description="Share of the prompts that no training sees.")
    vocab_size: int = Field(default=3000, ge=300, description="Of the byte-level tokenizer learnt from the file.")


class EvaluationSettings(_Settings):
    """How the policies before and after are compared."""

    num_prompts: int = Field(default=256, ge=1, description="Held-out prompts, one response of each policy to each.")
    probe_prompts: int = Field(default=64, ge=0, description="Of these, prompts answered again and again during PPO.")
    probe_seconds: float = Field(default=8.0, gt=0, description="Time between two such looks.")


class PipelineConfig(_Settings):
    """A pipeline from data to report."""

    name: str = Field(pattern=r"[a-z0-9][a-z0-9-]*")
    title: str = Field(description="Headline of the report.")
    about: str = Field(default="", description="A sentence or two for the report.")
    seed: int = Field(default=0, ge=0)
    source: Annotated[LanguageSource | ComparisonSource, Field(discriminator="kind")]
    max_prompt_tokens: int = Field(default=64, ge=1)
    max_response_tokens: int = Field(default=48, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    num_threads: int = Field(default=2, ge=1, description="Threads of a training job.")
    model: dict[str, Any] = Field(description="The model from scratch, as Hugging Face names its settings.")
    sft: dict[str, Any] = Field(default_factory=dict)
    reward_model: dict[str, Any] = Field(default_factory=dict)
    ppo: dict[str, Any] = Field(default_factory=dict)
    evaluation: EvaluationSettings = EvaluationSettings()
    services: dict[Literal["policy", "reference", "reward"], dict[str, Any]] = Field(
        default_factory=dict, description="Further flags of the services."
    )


class ConfigError(ValueError):
    """The file cannot be used; one line for each bad key."""


def load_config(path: Path, changes: list[str], *, data: Path | None = None) -> PipelineConfig:
    """Reads the file and applies changes such as "ppo.total_steps=20". ConfigError for what is wrong."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    for change in changes:
        keys, separator, text = change.partition("=")
        if not separator:
            raise ConfigError(f"--set {change}: allowed: KEY=VALUE, for example ppo.total_steps=20")
        _put(values, keys.split("."), yaml.safe_load(text))
    if data is not None:
        _put(values, ["source", "path"], str(data))
    try:
        return PipelineConfig.model_validate(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
        raise ConfigError(f"{path}:\n  " + "\n  ".join(lines)) from None


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both, the second over the first, mappings below merged likewise."""
    result = dict(first)
    for key, value in second.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _put(values: Any, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {'.'.join(keys)}: {key} is no mapping")
    values[keys[-1]] = value
