"""What a dialect of HTTP scoring is: how a body becomes items, and how their scores become a body."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from steersman.reward.plugin import ChatTurn
from steersman.reward.types import ChatContent, Content, Score, ScoreItem, ScoreOptions, TextContent
from steersman.wire.errors import Code, FieldViolation, Reason, SteersmanError

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request as items. For the answer: `request`, what the dialect made of the body; `scorer`, who scored them."""

    items: Sequence[ScoreItem]
    options: ScoreOptions = field(default_factory=ScoreOptions)
    request: Any = None
    scorer: str = ""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One path. `read` gets the decoded JSON and the scorer that the address names ("" for the default one); `write`
    gets a score for every item: where one has none, the whole answer is an error.
    """

    path: str
    read: Callable[[Any, str], Call]
    write: Callable[[Call, Sequence[Score]], Any]


class Body(BaseModel):
    """A body whose further keys are taken and left alone: those who send them have others to talk to as well."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Message(BaseModel):
    """One turn of a conversation, with text as it stands or in parts."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: "str | list[Part] | None" = ""

    def turn(self) -> ChatTurn:
        """The turn as scorers see it; a developer's is a system's."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        return ChatTurn(role="system" if self.role == "developer" else self.role, content=text)


class Part(BaseModel):
    """A part of a turn. Only text can be scored."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "input_text", "output_text"]
    text: str


def parse(model: type[Model], body: Any, *, at: str = "") -> Model:
    """The body, or the part of it that is `at`, as `model`. Raises INVALID_FIELD naming every field that is wrong."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        violations = [
            FieldViolation(field=".".join(filter(None, [at, *map(str, one["loc"])])) or "body", description=one["msg"])
            for one in error.errors(include_url=False, include_input=False)
        ]
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
        raise SteersmanError(Reason.INVALID_FIELD, text, violations=violations) from None


def content(prompt: str | Sequence[Message], response: str) -> Content:
    """Prompt and response, either of them as text or as the turns of a conversation."""
    if isinstance(prompt, str):
        return TextContent(prompt=prompt, response=response)
    turns = tuple(message.turn() for message in prompt)
    return ChatContent(messages=turns, response=ChatTurn(role="assistant", content=response))


def item(index: int, found: Content | None, context: Mapping[str, Any] | None = None) -> ScoreItem:
    """An item that is named by its place."""
    return ScoreItem(id=str(index), content=found, context=context or {})


HTTP_STATUS: Mapping[Code, int] = {
    Code.INVALID_ARGUMENT: 400,
    Code.OUT_OF_RANGE: 400,
    Code.FAILED_PRECONDITION: 400,
    Code.UNAUTHENTICATED: 401,
    Code.PERMISSION_DENIED: 403,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.ABORTED: 409,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.CANCELLED: 499,
    Code.UNIMPLEMENTED: 501,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
}
"""As google.rpc.Code maps them; 500 for the rest."""
