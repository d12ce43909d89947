"""Messages of the reward service to plain values and back. Nothing is checked here: the handler and the scorers do."""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from google.protobuf import duration_pb2, json_format, struct_pb2
from numpy.typing import NDArray

from steersman.reward.handler import StreamPart
from steersman.reward.plugin import ChatTurn
from steersman.reward.types import (
    ChatContent,
    Content,
    ItemScore,
    MemberOutcome,
    Score,
    ScoreItem,
    ScoreOptions,
    ScorerInfo,
    ScorerKind,
    TextContent,
    TokenContent,
)
from steersman.serving.batching import Priority
from steersman.v1 import reward_pb2, types_pb2
from steersman.wire.convert import model_to_proto
from steersman.wire.errors import invalid_field
from steersman.wire.status import status_to_proto

_KIND: Final = {
    ScorerKind.MODEL: reward_pb2.SCORER_KIND_MODEL,
    ScorerKind.FUNCTION: reward_pb2.SCORER_KIND_FUNCTION,
    ScorerKind.ENSEMBLE: reward_pb2.SCORER_KIND_ENSEMBLE,
}
_NO_CONTEXT: Final[Mapping[str, Any]] = {}
_OK: Final = status_to_proto(None)


def request_from_proto(request: reward_pb2.ScoreRequest) -> tuple[list[ScoreItem], ScoreOptions]:
    """Items and options of a request. Raises INVALID_FIELD for options that are not of their enum."""
    return items_from_proto(request.items), options_from_proto(request.options)


def items_from_proto(items: Iterable[reward_pb2.ScoreItem]) -> list[ScoreItem]:
    """The items of a request. Raises INVALID_FIELD for a context or timeout that has no meaning."""
    return [
        ScoreItem(
            id=item.id,
            content=_content(item),
            context=_context(item.context, f"items[{index}].context") if item.HasField("context") else _NO_CONTEXT,
            timeout_s=_timeout(item.timeout, f"items[{index}].timeout") if item.HasField("timeout") else None,
        )
        for index, item in enumerate(items)
    ]


def options_from_proto(options: reward_pb2.ScoreOptions) -> ScoreOptions:
    """The options of a request. Raises INVALID_FIELD for values that are not of their enum."""
    if options.overlength not in reward_pb2.Overlength.values():
        raise invalid_field("options.overlength", options.overlength, "a value of Overlength")
    if options.priority not in reward_pb2.PriorityClass.values():
        raise invalid_field("options.priority", options.priority, "a value of PriorityClass")
    interactive = options.priority == reward_pb2.PRIORITY_CLASS_INTERACTIVE
    return ScoreOptions(
        scorer=options.scorer,
        truncate_prompt=options.overlength == reward_pb2.OVERLENGTH_TRUNCATE_PROMPT,
        priority=Priority.INTERACTIVE if interactive else Priority.BULK,
        include_raw=options.include_raw,
    )


async def parts_from_proto(messages: AsyncIterator[reward_pb2.StreamScoreRequest]) -> AsyncIterator[StreamPart]:
    """The messages of a stream as plain values."""
    async for message in messages:
        options = options_from_proto(message.options) if message.HasField("options") else None
        yield StreamPart(items=items_from_proto(message.items), options=options)


def scores_to_proto(scores: Sequence[ItemScore]) -> list[reward_pb2.ItemScore]:
    """The outcomes of items."""
    return [_score_to_proto(item) for item in scores]


def scorers_to_proto(scorers: Sequence[ScorerInfo]) -> reward_pb2.ListScorersResponse:
    """The list of scorers."""
    response = reward_pb2.ListScorersResponse()
    for scorer in scorers:
        response.scorers.add(
            name=scorer.name,
            kind=_KIND[scorer.kind],
            model=model_to_proto(scorer.model) if scorer.model is not None else None,
            members=scorer.members,
            is_default=scorer.is_default,
        )
    return response


def _score_to_proto(item: ItemScore) -> reward_pb2.ItemScore:
    outcome = item.outcome
    if not isinstance(outcome, Score):
        return reward_pb2.ItemScore(
            id=item.id,
            status=status_to_proto(outcome),
            scorer=item.scorer,
            model=item.model,
            revision=item.revision,
        )
    return reward_pb2.ItemScore(
        id=item.id,
        status=_OK,
        score=outcome.value,
        raw_score=outcome.raw if item.include_raw else None,
        members=[_member_to_proto(member, include_raw=item.include_raw) for member in outcome.members],
        spread=outcome.spread,
        truncated=outcome.truncated,
        num_tokens=outcome.num_tokens,
        scorer=item.scorer,
        model=item.model,
        revision=item.revision,
        length_penalty=outcome.length_penalty,
    )


def _member_to_proto(member: MemberOutcome, *, include_raw: bool) -> reward_pb2.MemberScore:
    outcome = member.outcome
    return reward_pb2.MemberScore(
        scorer=member.scorer,
        status=_OK if isinstance(outcome, Score) else status_to_proto(outcome),
        score=outcome.value if isinstance(outcome, Score) else None,
        weight=member.weight,
        revision=member.revision,
        model=member.model,
        raw_score=outcome.raw if isinstance(outcome, Score) and include_raw else None,
        length_penalty=outcome.length_penalty if isinstance(outcome, Score) else None,
    )


def _content(item: reward_pb2.ScoreItem) -> Content | None:
    match item.WhichOneof("content"):
        case "tokens":
            return TokenContent(prompt=_ids(item.tokens.prompt), response=_ids(item.tokens.response))
        case "text":
            return TextContent(prompt=item.text.prompt, response=item.text.response)
        case "chat":
            turns = tuple(ChatTurn(role=turn.role, content=turn.content) for turn in item.chat.prompt.messages)
            reply = item.chat.response
            return ChatContent(messages=turns, response=ChatTurn(role=reply.role, content=reply.content))
        case _:
            return None


def _ids(message: types_pb2.TokenIds) -> NDArray[np.int32]:
    # A slice is a list, made in C; numpy reading the repeated field itself asks for one element at a time.
    return np.array(message.ids[:], np.int32)


def _context(message: struct_pb2.Struct, field: str) -> Mapping[str, Any]:
    try:
        return json_format.MessageToDict(message)
    except (ValueError, json_format.SerializeToJsonError) as error:
        raise invalid_field(field, "a number that is not finite", "what JSON can say") from error


def _timeout(message: duration_pb2.Duration, field: str) -> float:
    try:
        return message.ToTimedelta().total_seconds()
    except (OverflowError, ValueError) as error:
        raise invalid_field(field, f"{message.seconds} s", "a Duration of at most 10,000 years") from error
