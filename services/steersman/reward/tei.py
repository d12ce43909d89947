"""Text Embeddings Inference's `Predict` in front of the default scorer, so that its clients score with any model.

A text is prompt and response in one, a pair is a prompt and a response. `raw_scores` gives the model's raw score, else
its sigmoid. `truncate` takes from the beginning of a pair's prompt; a response is never cut.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from importlib.metadata import version
from typing import Any, Final, TypeVar

import grpc

from steersman.reward.compat import tei_pb2, tei_pb2_grpc
from steersman.reward.handler import RewardHandler
from steersman.reward.outcomes import prediction, require_scores
from steersman.reward.types import ScoreItem, ScoreOptions, TextContent
from steersman.wire.errors import invalid_field
from steersman.wire.limits import MAX_BATCH_ITEMS

Context = grpc.aio.ServicerContext[Any, Any]
RequestT = TypeVar("RequestT", tei_pb2.PredictRequest, tei_pb2.PredictPairRequest)

SERVICES: Final = [tei_pb2.DESCRIPTOR.services_by_name[name].full_name for name in ("Info", "Predict")]


# Texts of one stream that are scored together; beyond that it is not read.
_MAX_AHEAD: Final = 256


class TeiServicer(tei_pb2_grpc.PredictServicer):
    """Converts, calls the handler, converts. Streams answer in order, and score what has come together."""

    def __init__(self, handler: RewardHandler) -> None:
        self._handler = handler

    async def Predict(  # noqa: N802
        self, request: tei_pb2.PredictRequest, context: Context
    ) -> tei_pb2.PredictResponse:
        """Scores a text."""
        return await self._answer(request, _text)

    async def PredictPair(  # noqa: N802
        self, request: tei_pb2.PredictPairRequest, context: Context
    ) -> tei_pb2.PredictResponse:
        """Scores a pair."""
        return await self._answer(request, _pair)

    async def PredictStream(  # noqa: N802
        self, request_iterator: AsyncIterator[tei_pb2.PredictRequest], context: Context
    ) -> AsyncIterator[tei_pb2.PredictResponse]:
        """Scores texts as they come."""
        async with aclosing(self._in_order(request_iterator, _text)) as responses:
            async for response in responses:
                yield response

    async def PredictPairStream(  # noqa: N802
        self, request_iterator: AsyncIterator[tei_pb2.PredictPairRequest], context: Context
    ) -> AsyncIterator[tei_pb2.PredictResponse]:
        """Scores pairs as they come."""
        async with aclosing(self._in_order(request_iterator, _pair)) as responses:
            async for response in responses:
                yield response

    async def _in_order(
        self, requests: AsyncIterator[RequestT], content: Callable[[RequestT], TextContent]
    ) -> AsyncGenerator[tei_pb2.PredictResponse, None]:
        answers: asyncio.Queue[asyncio.Task[tei_pb2.PredictResponse] | None] = asyncio.Queue()
        room = asyncio.Semaphore(_MAX_AHEAD)

        async def read() -> None:
            async for request in requests:
                await room.acquire()
                answers.put_nowait(asyncio.create_task(self._answer(request, content)))

        reader = asyncio.create_task(read())
        reader.add_done_callback(lambda _: answers.put_nowait(None))
        try:
            while (answer := await answers.get()) is not None:
                yield await answer
                room.release()
            await reader
        finally:
            reader.cancel()
            while not answers.empty():
                if (left := answers.get_nowait()) is not None:
                    left.cancel()

    async def _answer(self, request: RequestT, content: Callable[[RequestT], TextContent]) -> tei_pb2.PredictResponse:
        started = time.perf_counter_ns()
        found = content(request)
        options = ScoreOptions(truncate_prompt=request.truncate, include_raw=True)
        scores = require_scores(await self._handler.score([ScoreItem(id="0", content=found)], options))
        return tei_pb2.PredictResponse(
            predictions=[tei_pb2.Prediction(score=prediction(scores[0], raw=request.raw_scores), label="LABEL_0")],
            metadata=tei_pb2.Metadata(
                compute_chars=len(found.prompt) + len(found.response),
                compute_tokens=scores[0].num_tokens,
                total_time_ns=time.perf_counter_ns() - started,
            ),
        )


class TeiInfoServicer(tei_pb2_grpc.InfoServicer):
    """Tells what serves."""

    def __init__(self, handler: RewardHandler) -> None:
        self._handler = handler

    async def Info(self, request: tei_pb2.InfoRequest, context: Context) -> tei_pb2.InfoResponse:  # noqa: N802
        """Facts about the default scorer."""
        scorer = next(scorer for scorer in self._handler.scorers() if scorer.is_default)
        model = scorer.model
        return tei_pb2.InfoResponse(
            version=version("steersman"),
            model_id=model.name if model is not None else scorer.name,
            model_sha=model.revision if model is not None else None,
            model_type=tei_pb2.MODEL_TYPE_CLASSIFIER,
            max_input_length=model.max_sequence_tokens if model is not None else 0,
            max_client_batch_size=MAX_BATCH_ITEMS,
            tokenization_workers=1,
        )


def _text(request: tei_pb2.PredictRequest) -> TextContent:
    return TextContent(prompt="", response=request.inputs)


def _pair(request: tei_pb2.PredictPairRequest) -> TextContent:
    if len(request.inputs) != 2:
        raise invalid_field("inputs", f"{len(request.inputs)} texts", "2: a prompt and a response")
    return TextContent(prompt=request.inputs[0], response=request.inputs[1])
