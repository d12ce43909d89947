"""The settings of data: which files, and how a conversation becomes text. Imports nothing heavy."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from steersman.trainer.data.records import Message

Form = Literal["transcript", "preference", "candidates", "ranked", "messages", "completion", "prompt"]


class DataSettings(BaseModel):
    """Which files to read, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: tuple[str, ...] = Field(min_length=1, description="Paths or fsspec URLs: .jsonl, .jsonl.gz, .parquet.")
    form: Form | Literal["auto"] = Field(
        default="auto", description="The form of the rows; auto finds it for each file by its first readable row."
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        default="fail", description="fail stops at the first bad row; skip leaves bad rows out and counts them."
    )
    preference_base: Literal[0, 1] | None = Field(
        default=None,
        description="Number of the first candidate in human_preference; inferred from the file if left out.",
    )
    max_records: int | None = Field(default=None, ge=1, description="Read no more than this many good rows.")


class TranscriptTemplate(BaseModel):
    """How a conversation is written where there is no chat template: a marker before each turn, then its text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    system: str = Field(default="", description="Before a system turn.")
    user: str = Field(default="\n\nHuman: ", description="Before a user turn.")
    assistant: str = Field(default="\n\nAssistant: ", description="Before an assistant turn.")
    tool: str = Field(default="\n\nTool: ", description="Before a tool's turn.")
    prompt_end: str = Field(default="\n\nAssistant:", description="After the last turn: the response follows.")
    response_start: str = Field(default=" ", description="Before the text of a response.")

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, up to where the response begins."""
        turns = [getattr(self, message.role) + message.content for message in messages]
        return "".join(turns) + self.prompt_end
