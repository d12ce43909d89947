"""The setting that says where a model comes from. Imports neither torch nor transformers."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ModelSource(BaseModel):
    """Where a model comes from: exactly one of ``path`` and ``config``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = Field(default=None, min_length=1, description="A local directory or a hub id.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    config: dict[str, Any] | None = Field(
        default=None, description='A model from scratch: {"model_type": "qwen2", "hidden_size": 128, ...}.'
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of path (a directory or hub id) and config (a model from scratch)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config.model_type is missing: it names the architecture, such as 'qwen2' or 'llama'")
        return self
