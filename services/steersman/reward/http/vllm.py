"""vLLM's classification: `POST /classify`.

    {"model": NAME, "input": TEXT or [TEXT, ...] or [ID, ...] or [[ID, ...], ...], "use_activation": BOOL}
    {"model": NAME, "messages": MESSAGES, ...}
    {"id", "object": "list", "created", "model", "usage",
     "data": [{"index", "label", "probs": [NUMBER], "num_classes": 1}, ...]}

`probs` holds one number, made from the model's raw score: with `use_activation` (the default, as there) its sigmoid,
else the score itself. `model` names a scorer; without it the default one answers. Text becomes tokens as the scorer's
`encoding` says; token ids are taken as they are.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field, StrictInt, model_validator

from steersman.reward.http.dialect import Body, Call, Dialect, Message, item, parse
from steersman.reward.outcomes import prediction
from steersman.reward.types import ChatContent, Content, Score, ScoreOptions, TextContent, TokenContent
from steersman.wire.errors import invalid_field

_INT32 = 2**31


class Request(Body):
    """The body."""

    model: str = ""
    input: str | list[str] | list[StrictInt] | list[list[StrictInt]] | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)

    @model_validator(mode="after")
    def _one_input(self) -> "Request":
        if (self.input is None) == (self.messages is None):
            raise ValueError("input: allowed: exactly one of input and messages")
        return self


def read(body: Any, scorer: str) -> Call:
    """See `Dialect`."""
    request = parse(Request, body)
    if request.truncate_prompt_tokens is not None and request.truncate_prompt_tokens >= 0:
        raise invalid_field("truncate_prompt_tokens", request.truncate_prompt_tokens, "-1, the scorer's own limit")
    options = ScoreOptions(
        scorer=request.model or scorer, truncate_prompt=request.truncate_prompt_tokens == -1, include_raw=True
    )
    contents = [_chat(request.messages)] if request.messages is not None else _contents(request.input)
    return Call(items=[item(index, found) for index, found in enumerate(contents)], options=options, request=request)


def write(call: Call, scores: Sequence[Score]) -> dict[str, Any]:
    """See `Dialect`."""
    request: Request = call.request
    num_tokens = sum(score.num_tokens for score in scores)
    activated = request.use_activation is not False
    return {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": call.scorer,
        "data": [
            {"index": index, "label": "LABEL_0", "probs": [prediction(score, raw=not activated)], "num_classes": 1}
            for index, score in enumerate(scores)
        ],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0},
    }


def _chat(messages: Sequence[Message]) -> ChatContent:
    turns = [message.turn() for message in messages]
    return ChatContent(messages=tuple(turns[:-1]), response=turns[-1])


def _contents(given: Any) -> list[Content]:
    if isinstance(given, str):
        return [TextContent(prompt="", response=given)]
    if not given or isinstance(given[0], int):
        return [_tokens(0, given)]
    return [
        _tokens(index, one) if isinstance(one, list) else TextContent(prompt="", response=one)
        for index, one in enumerate(given)
    ]


def _tokens(index: int, ids: Sequence[int]) -> TokenContent:
    if any(not -_INT32 <= token < _INT32 for token in ids):
        raise invalid_field(f"input[{index}]", max(ids, key=abs), "token ids of 32 bits")
    return TokenContent(prompt=np.empty(0, np.int32), response=np.array(ids, np.int32))


DIALECT = Dialect(path="/classify", read=read, write=write)
