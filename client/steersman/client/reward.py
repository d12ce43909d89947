"""Clients of the reward service: a score or an error for every item, in the order of the items."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Final

import grpc

from steersman.client.calls import EOF, AsyncClient, Client, call_metadata, gather_bounded, map_bounded, translated
from steersman.client.prompts import (
    chat_to_proto,
    is_conversation,
    message_to_proto,
    to_struct,
    token_ids_to_proto,
)
from steersman.client.splitting import MAX_PARTS_IN_FLIGHT, split
from steersman.client.streams import Remembering, each
from steersman.client.types import (
    ChatMessage,
    MemberScore,
    Overlength,
    Priority,
    Prompt,
    Score,
    ScoreItem,
    Scorer,
    ScorerKind,
    TokenIds,
)
from steersman.v1 import reward_pb2, reward_pb2_grpc
from steersman.wire.convert import model_from_proto
from steersman.wire.endings import Endings
from steersman.wire.errors import Code, SteersmanError, invalid_field
from steersman.wire.status import status_from_proto

_OVERLENGTH: Final = {
    Overlength.FAIL: reward_pb2.OVERLENGTH_FAIL,
    Overlength.TRUNCATE_PROMPT: reward_pb2.OVERLENGTH_TRUNCATE_PROMPT,
}
_PRIORITY: Final = {
    Priority.INTERACTIVE: reward_pb2.PRIORITY_CLASS_INTERACTIVE,
    Priority.BULK: reward_pb2.PRIORITY_CLASS_BULK,
}
_KIND: Final = {
    reward_pb2.SCORER_KIND_MODEL: ScorerKind.MODEL,
    reward_pb2.SCORER_KIND_FUNCTION: ScorerKind.FUNCTION,
    reward_pb2.SCORER_KIND_ENSEMBLE: ScorerKind.ENSEMBLE,
}


def _content(item: ScoreItem, field: str) -> dict[str, Any]:
    """The item's content as the one field of a ScoreItem message that holds its kind."""
    prompt, response = item.prompt, item.response
    if is_conversation(prompt):
        reply = ChatMessage(role="assistant", content=response) if isinstance(response, str) else response
        if isinstance(reply, ChatMessage | Mapping):
            turn = message_to_proto(reply, f"{field}.response")
            chat = chat_to_proto(prompt, f"{field}.prompt")  # type: ignore[arg-type]
            return {"chat": reward_pb2.ChatPair(prompt=chat, response=turn)}
    elif isinstance(prompt, str) and isinstance(response, str):
        return {"text": reward_pb2.TextPair(prompt=prompt, response=response)}
    elif not isinstance(prompt, str) and not isinstance(response, str | ChatMessage | Mapping):
        pair = reward_pb2.TokenPair(
            prompt=token_ids_to_proto(prompt, f"{field}.prompt"),  # type: ignore[arg-type]
            response=token_ids_to_proto(response, f"{field}.response"),
        )
        return {"tokens": pair}
    found = f"{type(prompt).__name__} and {type(response).__name__}"
    raise invalid_field(field, found, "prompt and response both token ids, both text, or conversation and reply")


def item_to_proto(item: ScoreItem, field: str) -> reward_pb2.ScoreItem:
    """The message of an item. Raises INVALID_FIELD, naming the part of `field` that is malformed."""
    message = reward_pb2.ScoreItem(id=item.id, **_content(item, field))
    if item.context:
        message.context.CopyFrom(to_struct(item.context, f"{field}.context"))
    if item.timeout_seconds is not None:
        message.timeout.FromTimedelta(timedelta(seconds=item.timeout_seconds))
    return message


def score_items(
    items: Sequence[ScoreItem] | None, prompt: Prompt | None, responses: Sequence[str | TokenIds | ChatMessage] | None
) -> list[ScoreItem]:
    """The items of a call: given as such, or as one prompt with several responses."""
    if items is not None and prompt is None and responses is None:
        return list(items)
    if items is None and prompt is not None and responses is not None:
        return [ScoreItem(prompt=prompt, response=response) for response in responses]
    raise TypeError("score takes either items, or prompt and responses together")


def score_options(
    scorer: str, overlength: Overlength, priority: Priority, include_raw: bool
) -> reward_pb2.ScoreOptions:
    """How items are scored."""
    return reward_pb2.ScoreOptions(
        scorer=scorer,
        overlength=_OVERLENGTH[overlength],
        priority=_PRIORITY[priority],
        include_raw=include_raw,
    )


def score_requests(items: Sequence[ScoreItem], options: reward_pb2.ScoreOptions) -> list[reward_pb2.ScoreRequest]:
    """The requests for a batch of any size, in order."""
    messages = [item_to_proto(item, f"items[{index}]") for index, item in enumerate(items)]
    return [
        reward_pb2.ScoreRequest(items=messages[part.start : part.stop], options=options)
        for part in split([message.ByteSize() for message in messages])
    ]


def _outcome(message: Any, field: str) -> tuple[float | None, SteersmanError | None]:
    """Value or error of an ItemScore or MemberScore; an OK status without a score is an error of the server."""
    error = status_from_proto(message.status)
    if error is None and not message.HasField("score"):
        error = SteersmanError(None, f"{field} is OK but holds no score", code=Code.DATA_LOSS)
    return (None, error) if error is not None else (message.score, None)


def score_from_proto(message: reward_pb2.ItemScore) -> Score:
    """The score of one item."""
    value, error = _outcome(message, "result")
    return Score(
        id=message.id,
        value=value,
        error=error,
        raw=message.raw_score if message.HasField("raw_score") else None,
        length_penalty=message.length_penalty if message.HasField("length_penalty") else None,
        members=tuple(_member_from_proto(member) for member in message.members),
        spread=message.spread if message.HasField("spread") else None,
        truncated=message.truncated,
        num_tokens=message.num_tokens,
        scorer=message.scorer,
        model=message.model,
        revision=message.revision,
    )


def _member_from_proto(message: reward_pb2.MemberScore) -> MemberScore:
    value, error = _outcome(message, "member")
    return MemberScore(
        scorer=message.scorer,
        value=value,
        error=error,
        weight=message.weight,
        model=message.model,
        revision=message.revision,
        raw=message.raw_score if message.HasField("raw_score") else None,
        length_penalty=message.length_penalty if message.HasField("length_penalty") else None,
    )


def _scores_from_proto(
    requests: Sequence[reward_pb2.ScoreRequest], responses: Sequence[reward_pb2.ScoreResponse]
) -> list[Score]:
    """Scores of all parts, in the order of the items."""
    scores: list[Score] = []
    for request, response in zip(requests, responses, strict=True):
        if len(response.results) != len(request.items):
            message = f"{len(response.results)} results came for {len(request.items)} items"
            raise SteersmanError(None, message, code=Code.DATA_LOSS)
        scores.extend(score_from_proto(result) for result in response.results)
    return scores


def scorer_from_proto(message: reward_pb2.Scorer) -> Scorer:
    """One scorer."""
    return Scorer(
        name=message.name,
        kind=_KIND.get(message.kind, ScorerKind.MODEL),
        model=model_from_proto(message.model) if message.HasField("model") else None,
        members=tuple(message.members),
        is_default=message.is_default,
    )


class Outstanding:
    """The items of one scoring stream that have no score yet.

    Invariant: each item sent gets exactly one score, or the stream ends with an error.
    """

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._num_sent = 0

    def request(self, item: ScoreItem, options: reward_pb2.ScoreOptions) -> reward_pb2.StreamScoreRequest:
        """The message that sends an item; the first one carries the options. Raises INVALID_FIELD for a second id."""
        if item.id in self._ids:
            raise invalid_field("id", item.id, "an id that no other item of the stream under way has")
        message = reward_pb2.StreamScoreRequest(items=[item_to_proto(item, f"items[{self._num_sent}]")])
        if self._num_sent == 0:
            message.options.CopyFrom(options)
        self._ids.add(item.id)
        self._num_sent += 1
        return message

    def take(self, response: reward_pb2.StreamScoreResponse) -> list[Score]:
        """The scores of a message."""
        scores = [score_from_proto(result) for result in response.results]
        for score in scores:
            if score.id not in self._ids:
                raise SteersmanError(None, f"a score came for {score.id!r}, which waits for none", code=Code.DATA_LOSS)
            self._ids.remove(score.id)
        return scores

    def finish(self) -> None:
        """Raises if the stream ended while items waited for their scores."""
        if self._ids:
            some = ", ".join(sorted(self._ids)[:5])
            message = f"the stream ended without scores for {len(self._ids)} items: {some}"
            raise SteersmanError(None, message, code=Code.DATA_LOSS)


class AsyncRewardClient(AsyncClient):
    """Asyncio client of the reward service. Calls have 120 s unless `timeout` says otherwise."""

    default_timeout = 120.0
    _stub_type = reward_pb2_grpc.RewardServiceStub

    async def score(
        self,
        items: Sequence[ScoreItem] | None = None,
        *,
        prompt: Prompt | None = None,
        responses: Sequence[str | TokenIds | ChatMessage] | None = None,
        scorer: str = "",
        overlength: Overlength = Overlength.FAIL,
        priority: Priority = Priority.BULK,
        include_raw: bool = False,
        timeout: float | None = None,
    ) -> list[Score]:
        """One `Score` an item, in order; look at `.error`, or use `.unwrap()`.

        Batches of any size are cut into calls that run side by side (at most 8 at once). A full server queue is
        waited out within `timeout`. Raises SteersmanError if a whole call fails (unknown scorer, no service).

        Args:
            items: what to score; or `prompt` with `responses` to it.
            scorer: name of the scorer. Default: the server's default.
            overlength: what to do with items longer than the scorer accepts.
            priority: INTERACTIVE if somebody waits for the answer.
            include_raw: also return scores before normalisation and length penalty.
        """
        what = score_items(items, prompt, responses)
        requests = score_requests(what, score_options(scorer, overlength, priority, include_raw))
        deadline = self._deadline(timeout)
        calls = [partial(self._call, self._stub.Score, request, deadline) for request in requests]
        return _scores_from_proto(requests, await gather_bounded(calls, MAX_PARTS_IN_FLIGHT))

    async def score_stream(
        self,
        items: AsyncIterable[ScoreItem] | Iterable[ScoreItem],
        *,
        scorer: str = "",
        overlength: Overlength = Overlength.FAIL,
        priority: Priority = Priority.BULK,
        include_raw: bool = False,
        timeout: float | None = None,
    ) -> AsyncGenerator[Score, None]:
        """Scores items as they come; yields each score when it is there, in any order, told apart by `id`.

        Ids must differ among the items under way. The service holds `items` back when it has enough to do. An error
        that `items` raises ends the stream and comes out of here unchanged. Nothing is retried: a lost stream is
        an error.
        """
        options = score_options(scorer, overlength, priority, include_raw)
        metadata, outstanding = call_metadata(), Outstanding()
        call = self._stub.StreamScore(timeout=self._deadline(timeout).remaining(), metadata=metadata)
        ends = Endings(call)

        async def send() -> None:
            try:
                async for item in each(items):
                    request = outstanding.request(item, options)
                    try:
                        await call.write(request)
                    except (asyncio.InvalidStateError, grpc.RpcError):
                        return  # the server ended the call; reading tells why
                with suppress(asyncio.InvalidStateError):
                    await call.done_writing()
            except BaseException:
                call.cancel()
                raise

        sender = asyncio.create_task(send())
        try:
            while True:
                with translated(self.target, metadata), ends.told():
                    response = await call.read()
                if response is EOF:
                    break
                for score in outstanding.take(response):
                    yield score
            outstanding.finish()
        except SteersmanError:
            if sender.done() and not sender.cancelled():
                sender.result()  # the error of the source, if that is what ended the call
            raise
        finally:
            call.cancel()
            sender.cancel()
            await asyncio.wait([sender])

    async def scorers(self, *, timeout: float | None = 30.0) -> list[Scorer]:
        """Reward models, functions and ensembles of the service, ascending by name."""
        response = await self._call(self._stub.ListScorers, reward_pb2.ListScorersRequest(), timeout)
        return [scorer_from_proto(scorer) for scorer in response.scorers]


class RewardClient(Client):
    """Blocking client of the reward service. Calls have 120 s unless `timeout` says otherwise."""

    default_timeout = 120.0
    _stub_type = reward_pb2_grpc.RewardServiceStub

    def score(
        self,
        items: Sequence[ScoreItem] | None = None,
        *,
        prompt: Prompt | None = None,
        responses: Sequence[str | TokenIds | ChatMessage] | None = None,
        scorer: str = "",
        overlength: Overlength = Overlength.FAIL,
        priority: Priority = Priority.BULK,
        include_raw: bool = False,
        timeout: float | None = None,
    ) -> list[Score]:
        """One `Score` an item, in order; as `AsyncRewardClient.score`."""
        what = score_items(items, prompt, responses)
        requests = score_requests(what, score_options(scorer, overlength, priority, include_raw))
        deadline = self._deadline(timeout)
        calls = [partial(self._call, self._stub.Score, request, deadline) for request in requests]
        return _scores_from_proto(requests, map_bounded(calls, MAX_PARTS_IN_FLIGHT))

    def score_stream(
        self,
        items: Iterable[ScoreItem],
        *,
        scorer: str = "",
        overlength: Overlength = Overlength.FAIL,
        priority: Priority = Priority.BULK,
        include_raw: bool = False,
        timeout: float | None = None,
    ) -> Generator[Score, None, None]:
        """Scores items as they come; as `AsyncRewardClient.score_stream`. `items` is consumed in another thread."""
        options = score_options(scorer, overlength, priority, include_raw)
        metadata, outstanding = call_metadata(), Outstanding()
        requests = Remembering(outstanding.request(item, options) for item in items)
        call = self._stub.StreamScore(requests, timeout=self._deadline(timeout).remaining(), metadata=metadata)
        try:
            while True:
                with translated(self.target, metadata):
                    response = next(call, None)
                if response is None:
                    break
                yield from outstanding.take(response)
            outstanding.finish()
        except SteersmanError:
            requests.raise_error()
            raise
        finally:
            call.cancel()

    def scorers(self, *, timeout: float | None = 30.0) -> list[Scorer]:
        """Reward models, functions and ensembles of the service, ascending by name."""
        response = self._call(self._stub.ListScorers, reward_pb2.ListScorersRequest(), timeout)
        return [scorer_from_proto(scorer) for scorer in response.scorers]
