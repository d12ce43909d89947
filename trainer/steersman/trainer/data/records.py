"""What training reads, whatever form the files had."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


# Plain text is taken as it stands; messages go through the chat template.
Context = str | tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a record was read: the file as it was given, and its line (JSONL) or row (Parquet), from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a response is asked for."""

    prompt: Context
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A prompt and the response that a person wrote.

    >>> where = Origin(file="d.jsonl", line=1)
    >>> Demonstration(prompt=(Message(role="user", content="Hi"),), completion="Hello!", origin=where).completion
    'Hello!'
    """

    prompt: Context
    completion: str
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A prompt and at least two responses, ranked by a person.

    ``ranks`` go with ``responses``: 1 is the best, equal ranks are a tie. ``margin`` says, for two responses, how much
    better the better one is, in the unit of the reward; None if nobody said. ``subset`` is what the row is called to be
    told apart in an evaluation, ``annotator`` who ranked; empty if nobody said.
    """

    prompt: Context
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    origin: Origin
    margin: float | None = None
    subset: str = ""
    annotator: str = ""

    @property
    def best(self) -> str:
        """The first response of the best rank."""
        return self.responses[self.ranks.index(min(self.ranks))]


Record = Prompt | Demonstration | Comparison
