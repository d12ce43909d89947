"""OpenRLHF's remote reward: `POST /get_reward`.

    {"query": [TEXT, ...], "prompts": [TEXT, ...], "labels": [ANY, ...]}
    {"rewards": [NUMBER, ...], "scores": [NUMBER, ...], "extra_logs": {NAME: [NUMBER, ...]}}

A query is prompt and response in one, after the chat template; prompts and labels may be missing or null. Where a query
begins with its prompt, scorers are told where the response begins. A label is `label` in the context of an item.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import model_validator

from steersman.reward.http.dialect import Body, Call, Dialect, item, parse
from steersman.reward.types import Score, ScoreOptions, TextContent


class Request(Body):
    """The body."""

    query: str | list[str]
    prompts: list[str | None] | None = None
    labels: list[Any] | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> "Request":
        for name in ("prompts", "labels"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.queries):
                raise ValueError(f"{name}: has {len(values)} entries, allowed: {len(self.queries)}, one for each query")
        return self

    @property
    def queries(self) -> list[str]:
        """All queries."""
        return [self.query] if isinstance(self.query, str) else self.query


def read(body: Any, scorer: str) -> Call:
    """See `Dialect`."""
    request = parse(Request, body)
    prompts = request.prompts or [None] * len(request.queries)
    items = []
    for index, (query, prompt) in enumerate(zip(request.queries, prompts, strict=True)):
        begin = prompt if prompt is not None and query.startswith(prompt) else ""
        context = {"label": request.labels[index]} if request.labels is not None else {}
        items.append(item(index, TextContent(prompt=begin, response=query[len(begin) :]), context))
    return Call(items=items, options=ScoreOptions(scorer=scorer))


def write(call: Call, scores: Sequence[Score]) -> dict[str, Any]:
    """See `Dialect`."""
    values = [score.value for score in scores]
    return {"rewards": values, "scores": values, "extra_logs": {"num_tokens": [score.num_tokens for score in scores]}}


DIALECT = Dialect(path="/get_reward", read=read, write=write)
