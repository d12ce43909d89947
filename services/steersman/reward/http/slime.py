"""slime's `remote_rm`: `POST /slime` (its `rm_url` is the whole address).

    {"prompt": TEXT or MESSAGES, "response": TEXT, "label": ANY}
    NUMBER

The label is `label` in the context of the item.
"""

from collections.abc import Sequence
from typing import Any

from steersman.reward.http.dialect import Body, Call, Dialect, Message, content, item, parse
from steersman.reward.types import Score, ScoreOptions


class Request(Body):
    """The body."""

    prompt: str | list[Message]
    response: str
    label: Any = None


def read(body: Any, scorer: str) -> Call:
    """See `Dialect`."""
    request = parse(Request, body)
    context = {"label": request.label} if request.label is not None else {}
    return Call(
        items=[item(0, content(request.prompt, request.response), context)], options=ScoreOptions(scorer=scorer)
    )


def write(call: Call, scores: Sequence[Score]) -> float:
    """See `Dialect`."""
    return scores[0].value


DIALECT = Dialect(path="/slime", read=read, write=write)
