"""What the lead of a sharded trainer has the other ranks do for a publication, and how they do it.

The lead calls, a rank answers: with JSON, with bytes, or with the error that it met. A rank that dies fails every call
that waits for it with `RankLost`, which no other try can mend.
"""

import asyncio
import itertools
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, Final, TypeVar

import torch.distributed as dist

from steersman.trainer.weights.post import Line, Message
from steersman.v1 import types_pb2
from steersman.wire.errors import SteersmanError
from steersman.wire.status import status_from_proto, status_to_proto

_log = logging.getLogger(__name__)

T = TypeVar("T")
Answer = tuple[Any, bytes]
Serve = Callable[[str, Message], Awaitable[Answer]]

_CLOSE_SECONDS: Final = 10.0


class RankLost(RuntimeError):
    """A rank of the trainer is gone, or does what it should not."""


class Crew:
    """The other ranks, as the lead sees them. Thread-safe."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.ranks: Sequence[int] = range(1, dist.get_world_size(group))
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, tuple[int, Future[Answer]]] = {}
        self._lost: dict[int, str] = {}
        self._lines = {rank: Line(group, rank, self._answered, self._loser(rank)) for rank in self.ranks}

    def next_number(self) -> int:
        """A name for something that the ranks are to keep."""
        return next(self._numbers)

    def call(self, rank: int, name: str, **arguments: Any) -> "Future[Answer]":
        """Has one rank do something. Cancelling the future has it stop."""
        future: Future[Answer] = Future()
        with self._lock:
            number = next(self._numbers)
            if rank in self._lost:
                future.set_exception(_lost(rank, self._lost[rank]))
                return future
            self._waiting[number] = rank, future
            self._lines[rank].send({"call": number, "name": name, "arguments": arguments})
        future.add_done_callback(lambda done: self._done(rank, number, done))
        return future

    def tell(self, name: str, **arguments: Any) -> None:
        """Has all ranks do something, and does not ask what came of it."""
        for line in self._lines.values():
            line.send({"name": name, "arguments": arguments})

    async def call_all(self, name: str, **arguments: Any) -> list[Answer]:
        """What each rank answers. Cancelled, it has them stop."""
        return await gather(*(asyncio.wrap_future(self.call(rank, name, **arguments)) for rank in self.ranks))

    def close(self) -> None:
        """Ends the lines. Calls under way fail."""
        for line in self._lines.values():
            line.close()
        for rank in self.ranks:
            self._loser(rank)("the crew was closed")

    def _answered(self, message: Message, payload: bytes) -> None:
        with self._lock:
            _, future = self._waiting.pop(message["answer"], (0, None))
        if future is None or not future.set_running_or_notify_cancel():
            return
        if (kind := message.get("error")) is None:
            future.set_result((message["result"], payload))
        elif kind == "steersman":
            error = status_from_proto(types_pb2.ItemStatus.FromString(payload))
            future.set_exception(error or RankLost("a rank failed without saying how"))
        else:
            future.set_exception(RankLost(kind))

    def _done(self, rank: int, number: int, future: "Future[Answer]") -> None:
        with self._lock:
            self._waiting.pop(number, None)
        if future.cancelled():
            self._lines[rank].send({"cancel": number})

    def _loser(self, rank: int) -> Callable[[str], None]:
        def lost(why: str) -> None:
            with self._lock:
                self._lost[rank] = why
                numbers = [number for number, (of, _) in self._waiting.items() if of == rank]
                futures = [self._waiting.pop(number)[1] for number in numbers]
            for future in futures:
                if future.set_running_or_notify_cancel():
                    future.set_exception(_lost(rank, why))

        return lost


class Hand:
    """A rank that does what the lead says, on an event loop in a thread of its own."""

    def __init__(self, group: dist.ProcessGroup, serve: Serve) -> None:
        self._serve = serve
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._lost_lead = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="steersman-hand", daemon=True)
        self._thread.start()
        self._line = Line(group, 0, self._received, self._lost)

    def require_lead(self) -> None:
        """RankLost if the lead is gone."""
        if self._lost_lead:
            raise _lost(0, self._lost_lead)

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Ends what is under way, the line, then does `last` and ends the thread."""
        self._line.close()
        for work in (self._stop(), last):
            asyncio.run_coroutine_threadsafe(work, self._loop).result(_CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_SECONDS)
        self._loop.close()

    def _received(self, message: Message, _: bytes) -> None:
        self._loop.call_soon_threadsafe(self._start, message)

    def _start(self, message: Message) -> None:
        if (number := message.get("cancel")) is not None:
            if (task := self._tasks.get(number)) is not None:
                task.cancel()
            return
        number = message.get("call", -1)
        task = self._loop.create_task(self._do(number, message["name"], message["arguments"]))
        if number >= 0:
            self._tasks[number] = task
            task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def _do(self, number: int, name: str, arguments: Message) -> None:
        payload = b""
        try:
            result, payload = await self._serve(name, arguments)
            answer = {"answer": number, "result": result}
        except asyncio.CancelledError:
            answer = {"answer": number, "error": f"{name} was cancelled"}
        except SteersmanError as error:
            answer, payload = {"answer": number, "error": "steersman"}, status_to_proto(error).SerializeToString()
        except Exception as error:
            answer = {"answer": number, "error": f"rank {dist.get_rank()}, {name}: {type(error).__name__}: {error}"}
        if number >= 0:
            self._line.send(answer, payload)
        elif "error" in answer:
            _log.error("%s", answer["error"])

    def _lost(self, why: str) -> None:
        self._lost_lead = why
        self._loop.call_soon_threadsafe(self._cancel_all)

    def _cancel_all(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    async def _stop(self) -> None:
        tasks = list(self._tasks.values())
        self._cancel_all()
        await asyncio.gather(*tasks, return_exceptions=True)


async def gather(*works: Awaitable[T]) -> list[T]:
    """As asyncio.gather, but the first error ends the others before it is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _lost(rank: int, why: str) -> RankLost:
    return RankLost(f"rank {rank} of the trainer is gone: {why}")
