"""NeMo Gym's verification: `POST /verify`.

    {"responses_create_params": {"input": TEXT or MESSAGES, ...}, "response": {"output": [...], ...}, ...}
    the same body with "reward": NUMBER

The response is an object of OpenAI's Responses API; what is scored is the text of the messages in its output.
Everything else in the body is the context of the item, for Python scorers.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from steersman.reward.http.dialect import Body, Call, Dialect, Message, content, item, parse
from steersman.reward.types import Score, ScoreOptions
from steersman.wire.errors import invalid_field


class CreateParams(Body):
    """What the response was asked for with. Items of the input that are no messages (tool calls) are not scored."""

    input: str | list[dict[str, Any]]


class OutputPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str = ""


class OutputItem(BaseModel):
    """A message of the response, or something else that is left alone."""

    model_config = ConfigDict(extra="allow")

    type: str = "message"
    content: str | list[OutputPart] | None = None

    def text(self) -> str:
        """What the assistant said here."""
        if self.type != "message":
            return ""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or () if part.type == "output_text")


class Response(Body):
    """What the model answered."""

    output: list[OutputItem]


class Request(Body):
    """The body."""

    responses_create_params: CreateParams
    response: Response


def read(body: Any, scorer: str) -> Call:
    """See `Dialect`."""
    request = parse(Request, body)
    given = request.responses_create_params.input
    prompt = given if isinstance(given, str) else _messages(given)
    reply = "".join(output.text() for output in request.response.output)
    if not reply:
        raise invalid_field("response.output", "no text", "at least one message with output_text")
    context = {name: value for name, value in body.items() if name not in Request.model_fields}
    return Call(items=[item(0, content(prompt, reply), context)], options=ScoreOptions(scorer=scorer), request=body)


def write(call: Call, scores: Sequence[Score]) -> dict[str, Any]:
    """See `Dialect`."""
    return {**call.request, "reward": scores[0].value}


def _messages(given: Sequence[dict[str, Any]]) -> list[Message]:
    return [
        parse(Message, turn, at=f"responses_create_params.input.{index}")
        for index, turn in enumerate(given)
        if turn.get("type", "message") == "message"
    ]


DIALECT = Dialect(path="/verify", read=read, write=write)
