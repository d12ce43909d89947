"""A scorer that is a Python function: run off the event loop, with a time limit, an item's failure its own.

A thread cannot be ended from outside. A call that outlives its time limit is left behind on its daemon thread; when
`_MAX_LEFT_BEHIND` of them have piled up, further calls fail at once until one returns.
"""

import asyncio
import contextlib
import inspect
import logging
import math
import threading
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeAlias

from steersman.reward.plugin import ScoreFunction, ScorerInput
from steersman.reward.settings import FunctionScorerSettings
from steersman.reward.text import TextEncoder
from steersman.reward.types import (
    ChatContent,
    Score,
    ScoreItem,
    ScoreOptions,
    ScorerKind,
    TextContent,
    TokenContent,
    check_content,
    failed,
    settle,
)
from steersman.serving.batching import fail_after
from steersman.wire.errors import Reason, SteersmanError, invalid_field, queue_full, unavailable
from steersman.wire.identity import ModelInfo

logger = logging.getLogger(__name__)

_MAX_LEFT_BEHIND = 32

# Functions have no measurable rate before they return: a caller who meets a full queue comes back after this.
_RETRY_AFTER_S = 1.0


# What the function gets, and what each response costs.
_Inputs: TypeAlias = tuple[list[ScorerInput | SteersmanError], list[float | None]]


@dataclass(slots=True, eq=False)
class _Entry:
    scorer_input: ScorerInput
    future: "asyncio.Future[Score]"
    length_penalty: float | None


class FunctionScorer:
    """Create it on the event loop that serves."""

    kind = ScorerKind.FUNCTION
    model: ModelInfo | None = None

    def __init__(
        self,
        name: str,
        function: ScoreFunction,
        settings: FunctionScorerSettings,
        *,
        decoder: TextEncoder | None = None,
    ) -> None:
        """Without a `decoder` items that are token ids fail."""
        self.name = name
        self._function = function
        self._settings = settings
        self._decoder = decoder
        self._decoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"tokenizer-{name}")
        self._slots = asyncio.Semaphore(settings.max_concurrency)
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_waiting = 0
        self._num_left_behind = 0
        self._closed = False

    async def submit(self, items: Sequence[ScoreItem], options: ScoreOptions) -> "list[asyncio.Future[Score]]":
        """See `Scorer.submit`. Over-length and priority do not apply to a function."""
        inputs, penalties = await self._inputs(items)
        num_good = sum(isinstance(scorer_input, ScorerInput) for scorer_input in inputs)
        limit = self._settings.max_queue_items
        if self._closed:
            raise unavailable(f"scorer {self.name} is shutting down")
        if self._num_waiting and self._num_waiting + num_good > limit:
            raise queue_full(f"the queue of scorer {self.name}", limit, _RETRY_AFTER_S)
        loop = asyncio.get_running_loop()
        futures, entries = [], []
        for scorer_input, penalty, item in zip(inputs, penalties, items, strict=True):
            if isinstance(scorer_input, SteersmanError):
                futures.append(failed(scorer_input))
                continue
            entry = _Entry(scorer_input, loop.create_future(), penalty)
            if item.timeout_s is not None:
                fail_after(entry.future, item.timeout_s)
            futures.append(entry.future)
            entries.append(entry)
        size = self._settings.max_batch_items
        for start in range(0, len(entries), size):
            self._start(entries[start : start + size])
        return futures

    async def check_health(self) -> None:
        """Raises ENGINE_UNAVAILABLE when so many calls hang that none is made any more."""
        if self._num_left_behind >= _MAX_LEFT_BEHIND:
            raise unavailable(f"{self._num_left_behind} calls of scorer {self.name} hang")

    async def close(self) -> None:
        """See `Scorer.close`."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._decoding.shutdown(wait=False, cancel_futures=True)

    async def _inputs(self, items: Sequence[ScoreItem]) -> _Inputs:
        has_tokens = any(isinstance(item.content, TokenContent) for item in items)
        if self._decoder is not None and (has_tokens or self._settings.length_penalty is not None):
            return await asyncio.get_running_loop().run_in_executor(self._decoding, self._convert, items)
        return self._convert(items)

    def _convert(self, items: Sequence[ScoreItem]) -> _Inputs:
        inputs = [self._to_input(index, item) for index, item in enumerate(items)]
        if self._decoder is None or self._settings.length_penalty is None:
            return inputs, [None] * len(items)
        responses = [found.response if isinstance(found, ScorerInput) else "" for found in inputs]
        penalties: list[float | None] = []
        for item, num_tokens in zip(items, self._decoder.num_tokens(responses), strict=True):
            # Ids that were given count as they are: their text may be cut up otherwise.
            exact = len(item.content.response) if isinstance(item.content, TokenContent) else num_tokens
            penalties.append(self._settings.length_penalty.of(exact))
        return inputs, penalties

    def _to_input(self, index: int, item: ScoreItem) -> ScorerInput | SteersmanError:
        content, context = item.content, item.context
        error = check_content(index, content)
        if error is not None:
            return error
        match content:
            case TextContent():
                return ScorerInput(prompt=content.prompt, response=content.response, context=context)
            case ChatContent():
                return ScorerInput(
                    prompt=content.messages[-1].content,
                    response=content.response.content,
                    messages=content.messages,
                    context=context,
                )
            case TokenContent() if self._decoder is not None:
                try:
                    prompt, response = self._decoder.decode(content.prompt), self._decoder.decode(content.response)
                except (OverflowError, ValueError, IndexError):
                    allowed = "ids of the scorer's tokenizer"
                    return invalid_field(
                        f"items[{index}].tokens", "ids", allowed, reason=Reason.TOKEN_OUT_OF_VOCABULARY
                    )
                return ScorerInput(prompt=prompt, response=response, context=context)
        allowed = f"text or chat: scorer {self.name} has no tokenizer in its settings"
        return invalid_field(f"items[{index}].content", "tokens", allowed)

    def _start(self, entries: list[_Entry]) -> None:
        self._num_waiting += len(entries)
        task = asyncio.create_task(self._score(entries))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _score(self, entries: list[_Entry]) -> None:
        try:
            repeated = await self._call_in_slot(entries)
            # A call that failed as a whole does not say which item it was.
            await asyncio.gather(*(self._call_in_slot([entry]) for entry in repeated))
        finally:
            self._num_waiting -= len(entries)
            for entry in entries:
                settle(entry.future, unavailable(f"scorer {self.name} is shutting down"))

    async def _call_in_slot(self, entries: Sequence[_Entry]) -> list[_Entry]:
        """Scores by one call. Returns the items of a call that failed as a whole, unless there was just one."""
        async with self._slots:
            wanted = [entry for entry in entries if not entry.future.done()]
            if not wanted:
                return []
            outcomes = await self._call([entry.scorer_input for entry in wanted])
        if isinstance(outcomes, SteersmanError) and len(wanted) > 1 and self._num_left_behind < _MAX_LEFT_BEHIND:
            return wanted
        if isinstance(outcomes, SteersmanError):
            outcomes = [outcomes] * len(wanted)
        for entry, outcome in zip(wanted, outcomes, strict=True):
            settle(entry.future, _less_penalty(outcome, entry.length_penalty))
        return []

    async def _call(self, inputs: list[ScorerInput]) -> list[Score | SteersmanError] | SteersmanError:
        """An outcome an item, or one error for the call."""
        if self._num_left_behind >= _MAX_LEFT_BEHIND:
            message = f"{self._num_left_behind} calls of scorer {self.name} hang; no more are made"
            return SteersmanError(Reason.SCORER_FAILED, message)
        try:
            values = _as_list(await self._run_on_thread(inputs), len(inputs))
        except _LateError:
            message = f"scorer {self.name} did not return within {self._settings.timeout_seconds:g} s"
            logger.warning(message)
            return SteersmanError(Reason.SCORER_FAILED, message)
        except Exception as error:
            # What a function says of its own errors may hold private data: the log has it, the caller does not.
            logger.warning("scorer %s failed on %d items", self.name, len(inputs), exc_info=error)
            return SteersmanError(Reason.SCORER_FAILED, f"scorer {self.name} raised {type(error).__name__}")
        return [self._outcome(value) for value in values]

    def _outcome(self, value: object) -> Score | SteersmanError:
        if value is None:
            return SteersmanError(Reason.SCORER_FAILED, f"scorer {self.name} returned None for the item")
        try:
            # numpy's and torch's scalars convert as well.
            number = float(value)  # type: ignore[arg-type]
        except Exception:
            kind = type(value).__name__
            return SteersmanError(Reason.SCORER_FAILED, f"scorer {self.name} returned a {kind} for the item")
        if not math.isfinite(number):
            return SteersmanError(Reason.NOT_FINITE, f"scorer {self.name} gave {number} for the item")
        return Score(value=number, raw=number)

    async def _run_on_thread(self, inputs: list[ScorerInput]) -> object:
        """What the function returns. Raises what it raises, or `_LateError`."""
        loop = asyncio.get_running_loop()
        # Holds what was returned, or what was raised: a future takes no StopIteration.
        done: asyncio.Future[tuple[object, BaseException | None]] = loop.create_future()
        timeout_s = self._settings.timeout_seconds
        left_behind = False

        def work() -> None:
            returned: object = None
            raised: BaseException | None = None
            try:
                returned = self._function(inputs)
                if inspect.isawaitable(returned):
                    returned = asyncio.run(_within(returned, timeout_s))
            except BaseException as error:
                raised = error
            # A closed loop has nobody left who waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(finish, returned, raised)

        def finish(returned: object, raised: BaseException | None) -> None:
            if left_behind:
                self._num_left_behind -= 1
            if not done.done():
                done.set_result((returned, raised))

        threading.Thread(target=work, name=f"scorer-{self.name}", daemon=True).start()
        try:
            async with asyncio.timeout(timeout_s):
                returned, raised = await done
        except (TimeoutError, asyncio.CancelledError) as error:
            left_behind = True
            self._num_left_behind += 1
            if isinstance(error, TimeoutError):
                raise _LateError from None
            raise
        if isinstance(raised, Exception):
            raise raised
        if raised is not None:
            raise RuntimeError(f"ended by {type(raised).__name__}") from raised
        return returned


class _LateError(Exception):
    """The time limit passed."""


async def _within(awaitable: Awaitable[object], timeout_s: float) -> object:
    try:
        async with asyncio.timeout(timeout_s) as limit:
            return await awaitable
    except TimeoutError:
        if limit.expired():
            raise _LateError from None
        raise


def _less_penalty(outcome: Score | SteersmanError, penalty: float | None) -> Score | SteersmanError:
    if isinstance(outcome, SteersmanError) or penalty is None:
        return outcome
    return replace(outcome, value=outcome.value - penalty, length_penalty=penalty)


def _as_list(values: object, num_items: int) -> list[object]:
    """The values that a function returned: a sequence, an array or a tensor. TypeError, ValueError for others."""
    is_list_like = hasattr(values, "__len__") and hasattr(values, "__getitem__")
    if not is_list_like or isinstance(values, str | bytes | Mapping):
        raise TypeError(f"returned a {type(values).__name__}, allowed: a sequence of numbers")
    found: list[object] = list(values)  # type: ignore[call-overload]
    if len(found) != num_items:
        raise ValueError(f"returned {len(found)} scores for {num_items} items")
    return found
