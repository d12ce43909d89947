"""The HTTP application: bodies in, scores out, errors as JSON.

The dialects have no place for an item that failed. So the answer is an error when one fails: its status is that of the
first failure, it names every failed item, and it gives the scores of the others. Nothing is lost, and no failure
looks like a score.

    {"error": {"reason", "message", "fields": [...],
               "items": [{"index", "reason", "message"}], "scores": [NUMBER or null, ...]}}
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final, TypeVar

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from steersman.reward.handler import RewardHandler
from steersman.reward.http import nemo_gym, openrlhf, slime, vllm
from steersman.reward.http.dialect import HTTP_STATUS, Call, Dialect
from steersman.reward.types import ItemScore, Score, ScoreItem
from steersman.serving.interceptor import REQUEST_ID_KEY, accept_request_id, translate
from steersman.serving.logging import request_id
from steersman.serving.metrics import Metrics
from steersman.serving.security.access import bearer_token
from steersman.serving.security.gate import Gate
from steersman.wire.errors import Code, Reason, SteersmanError, invalid_field
from steersman.wire.limits import MAX_BATCH_ITEMS

logger = logging.getLogger(__name__)

DIALECTS: Final[Sequence[Dialect]] = (openrlhf.DIALECT, slime.DIALECT, vllm.DIALECT, nemo_gym.DIALECT)

_SCORE: Final = "/steersman.v1.RewardService/Score"
_LIST: Final = "/steersman.v1.RewardService/ListScorers"
# Between two looks whether the caller of a running call is still there.
_LOOK_SECONDS: Final = 0.5

Answer = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


def make_app(
    handler: RewardHandler, metrics: Metrics, gate: Gate, *, max_body_bytes: int, timeout_seconds: float
) -> Starlette:
    """Every dialect on its path, `GET /health` and `GET /scorers`.

    `gate` knows callers by `Authorization: Bearer TOKEN`; health is for all.

    Bodies beyond `max_body_bytes` are refused (413); calls that take longer than `timeout_seconds` end (504), and their
    items with them. `?scorer=NAME` on any path names a scorer.
    """
    front = _Front(handler, metrics, gate, max_body_bytes, timeout_seconds)
    routes = [Route(dialect.path, front.scoring(dialect), methods=["POST"]) for dialect in DIALECTS]
    routes.append(Route("/health", front.health, methods=["GET"]))
    routes.append(Route("/scorers", front.listing(), methods=["GET"]))
    return Starlette(routes=routes)


class _Front:
    def __init__(
        self, handler: RewardHandler, metrics: Metrics, gate: Gate, max_body_bytes: int, timeout_seconds: float
    ) -> None:
        self._handler = handler
        self._metrics = metrics
        self._gate = gate
        self._max_body_bytes = max_body_bytes
        self._timeout_seconds = timeout_seconds

    def scoring(self, dialect: Dialect) -> Answer:
        """The endpoint of one dialect."""

        async def score(request: Request) -> Response:
            body = await read_json(request, self._max_body_bytes)
            call = dialect.read(body, request.query_params.get("scorer", ""))
            scores = await _unless_gone(request, self._score(call))
            failed = [score for score in scores if not isinstance(score.outcome, Score)]
            if failed:
                return items_failed(scores)
            values = [score.outcome for score in scores if isinstance(score.outcome, Score)]
            return JSONResponse(dialect.write(replace(call, scorer=scores[0].scorer), values))

        return self._around(f"POST {dialect.path}", _SCORE, score)

    async def health(self, request: Request) -> Response:
        """200 while the scorers can score."""
        try:
            await self._handler.check_health()
        except Exception as error:
            return JSONResponse({"status": "unavailable", "why": str(error)[:200]}, 503)
        return JSONResponse({"status": "ok"})

    def listing(self) -> Answer:
        """The endpoint that names the scorers."""
        return self._around("GET /scorers", _LIST, self._list)

    async def _list(self, request: Request) -> Response:
        return JSONResponse(
            {
                "scorers": [
                    {
                        "name": scorer.name,
                        "kind": scorer.kind.value,
                        "model": scorer.model.name if scorer.model else None,
                        "revision": scorer.model.revision if scorer.model else None,
                        "is_default": scorer.is_default,
                    }
                    for scorer in self._handler.scorers()
                ]
            }
        )

    async def _score(self, call: Call) -> list[ItemScore]:
        """All items, however many: HTTP callers know nothing of batches."""
        if not call.items:
            raise invalid_field("body", "no items", "at least one item to score")
        parts: list[Sequence[ScoreItem]] = [
            call.items[start : start + MAX_BATCH_ITEMS] for start in range(0, len(call.items), MAX_BATCH_ITEMS)
        ]
        async with asyncio.timeout(self._timeout_seconds), asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._handler.score(part, call.options)) for part in parts]
        return [score for task in tasks for score in task.result()]

    def _around(self, method: str, like: str, inner: Answer) -> Answer:
        """What happens around every call; `like` is the gRPC method that asks for the same role."""

        async def answer(request: Request) -> Response:
            identifier = accept_request_id(request.headers.get(REQUEST_ID_KEY))
            async with self._observed(method, identifier) as outcome:
                try:
                    with self._gate.admit(
                        like,
                        token=bearer_token(request.headers.get("authorization")),
                        certificate_names=(),
                        address=request.client.host if request.client is not None else "",
                    ):
                        response = await inner(request)
                except ClientDisconnect:
                    outcome.append(Code.CANCELLED)
                    return Response(status_code=HTTP_STATUS[Code.CANCELLED])
                except Exception as error:
                    public = translate(_bare(error), identifier)
                    logger.info("call failed", extra={"method": method, "code": public.code.name, "why": str(public)})
                    outcome.append(public.code)
                    response = error_response(public)
                response.headers[REQUEST_ID_KEY] = identifier
                return response

        return answer

    @asynccontextmanager
    async def _observed(self, method: str, identifier: str) -> AsyncIterator[list[Code]]:
        token = request_id.set(identifier)
        in_flight = self._metrics.rpc_in_flight.labels(method)
        in_flight.inc()
        start = time.perf_counter()
        outcome: list[Code] = []
        try:
            yield outcome
        finally:
            in_flight.dec()
            code = outcome[0] if outcome else Code.OK
            self._metrics.rpc_seconds.labels(method, code.name).observe(time.perf_counter() - start)
            request_id.reset(token)


async def read_json(request: Request, max_bytes: int) -> Any:
    """The body. Raises REQUEST_TOO_LARGE while it is still coming, INVALID_FIELD for what is not JSON."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            found = f"more than {max_bytes} bytes"
            raise invalid_field("body", found, f"at most {max_bytes} bytes", reason=Reason.REQUEST_TOO_LARGE)
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise invalid_field("body", bytes(body[:40]).decode(errors="replace"), f"JSON ({error})") from None


def error_response(error: SteersmanError) -> JSONResponse:
    """An error as JSON, under the status that its code maps to."""
    status = 413 if error.reason is Reason.REQUEST_TOO_LARGE else HTTP_STATUS.get(error.code, 500)
    headers = {"Retry-After": str(max(1, round(error.retry_after_seconds)))} if error.retry_after_seconds else None
    return JSONResponse({"error": _error(error)}, status, headers)


def items_failed(scores: Sequence[ItemScore]) -> JSONResponse:
    """The error that tells which items failed and why, with the scores of the others."""
    failed = [(index, s.outcome) for index, s in enumerate(scores) if isinstance(s.outcome, SteersmanError)]
    first = failed[0][1]
    values = [score.outcome.value if isinstance(score.outcome, Score) else None for score in scores]
    items = [{"index": index, "reason": error.reason, "message": error.message} for index, error in failed]
    content = {"error": {**_error(first), "items": items, "scores": values}}
    return JSONResponse(content, HTTP_STATUS.get(first.code, 500))


def _error(error: SteersmanError) -> dict[str, Any]:
    fields = [{"field": one.field, "description": one.description} for one in error.violations]
    return {"reason": error.reason, "message": error.message, "fields": fields}


def _bare(error: Exception) -> Exception:
    """What failed inside a task group, by itself."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result, unless the caller goes away first: then the work is cancelled. Raises ClientDisconnect.

    Only once the body has been read: looking for the caller would take a part of it away.
    """
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK_SECONDS))[0]:
            if await request.is_disconnected():
                raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
