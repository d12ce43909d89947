"""What is scored and what comes back, between the wire and the scorers."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from steersman.reward.plugin import ChatTurn
from steersman.serving.batching import Priority
from steersman.wire.errors import SteersmanError, invalid_field
from steersman.wire.identity import ModelInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenContent:
    """Prompt and response as token ids of the scorer's own tokenizer, int32."""

    prompt: NDArray[np.int32]
    response: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextContent:
    """Prompt and response as text; the response follows the prompt without a separator."""

    prompt: str
    response: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatContent:
    """A conversation and the reply to it."""

    messages: tuple[ChatTurn, ...]
    response: ChatTurn


Content: TypeAlias = TokenContent | TextContent | ChatContent


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreItem:
    """Something to score. `content` is None if the caller sent none; `timeout_s` is None without a limit."""

    id: str
    content: Content | None
    context: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How to score. An empty `scorer` is the default one."""

    scorer: str = ""
    truncate_prompt: bool = False
    priority: Priority = Priority.BULK
    include_raw: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A score (finite), the one before normalisation and length penalty, and how many tokens it took (0: a function).

    `length_penalty` was subtracted; None without such a setting. A combined score has no `raw`, but `members` and
    their `spread`.
    """

    value: float
    raw: float | None
    num_tokens: int = 0
    truncated: bool = False
    length_penalty: float | None = None
    members: "tuple[MemberOutcome, ...]" = ()
    spread: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberOutcome:
    """The part of one scorer in a combined score; its weight is 0 if it failed."""

    scorer: str
    outcome: Score | SteersmanError
    weight: float
    model: str = ""
    revision: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemScore:
    """The outcome of one item: a score or an error; who answered, and by which model of which revision."""

    id: str
    outcome: Score | SteersmanError
    scorer: str
    model: str = ""
    revision: str = ""
    include_raw: bool = False


class ScorerKind(StrEnum):
    """What kind of scorer it is."""

    MODEL = "model"
    FUNCTION = "function"
    ENSEMBLE = "ensemble"


@dataclass(frozen=True, kw_only=True)
class ScorerInfo:
    """A scorer for people to see; `model` is None for all but models, `members` are the names that an ensemble has."""

    name: str
    kind: ScorerKind
    model: ModelInfo | None = None
    members: tuple[str, ...] = ()
    is_default: bool = False


class Scorer(Protocol):
    """One way to score. All methods are called on the event loop."""

    @property
    def name(self) -> str:
        """Its own name; several names may lead to it."""
        ...

    @property
    def kind(self) -> ScorerKind:
        """What kind it is."""
        ...

    @property
    def model(self) -> ModelInfo | None:
        """The model behind it."""
        ...

    async def submit(self, items: Sequence[ScoreItem], options: ScoreOptions) -> "list[asyncio.Future[Score]]":
        """Admits all items or none; a future each, which fails with a `SteersmanError` if the item does.

        Errors name the item as `items[INDEX]`. Cancelling a future withdraws its item. Raises QUEUE_FULL or
        ENGINE_UNAVAILABLE.
        """
        ...

    async def check_health(self) -> None:
        """Raises when it cannot score."""
        ...

    async def close(self) -> None:
        """Fails what waits and frees the model."""
        ...


def check_content(index: int, content: Content | None) -> SteersmanError | None:
    """What is wrong with the content of an item, whichever scorer it is for."""
    path = f"items[{index}]"
    match content:
        case None:
            return invalid_field(f"{path}.content", None, "one of tokens, text, chat")
        case TokenContent(response=response) if not len(response):
            return invalid_field(f"{path}.tokens.response", [], "at least 1 token")
        case TextContent(response=""):
            return invalid_field(f"{path}.text.response", "", "text of at least 1 character")
        case ChatContent(messages=()):
            return invalid_field(f"{path}.chat.prompt.messages", [], "at least 1 message")
        case ChatContent(response=ChatTurn(content="")):
            return invalid_field(f"{path}.chat.response.content", "", "text of at least 1 character")
    return None


def failed(error: SteersmanError) -> "asyncio.Future[Score]":
    """A future of the running loop that has failed already."""
    future: asyncio.Future[Score] = asyncio.get_running_loop().create_future()
    settle(future, error)
    return future


def settle(future: "asyncio.Future[Score]", outcome: Score | BaseException) -> None:
    """Gives a future its outcome, unless it has one."""
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
        # Looked at here, so that nothing is logged if the caller is cancelled before it looks.
        future.exception()
    else:
        future.set_result(outcome)
