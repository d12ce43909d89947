"""How the nodes of a job begin together, and learn that one of them is gone.

The first node coordinates; every node, the first too, holds a connection to it. Lines of JSON go both ways:

    node         {"node": 2}  {"ended": 143, "round": 1, "leaving": false}  {}
    coordinator  {"begin": 1}  {"stop": 1, "why": "node 2 is gone"}  {"over": 0, "why": ""}  {}

Invariants:

- A round begins when all nodes are there and none works. It ends on all of them before the next begins.
- A node that is lost stops the round on the others: a new one begins with its successor. That a worker fails because
  its peer was lost may be heard before the loss, so a failure counts only if no node is lost for a while after it.
- `{}` is sent every few seconds; who is silent for longer is lost.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from steersman.cluster.objects import EXIT_STOPPED

logger = logging.getLogger(__name__)

MAX_LINE_BYTES: Final = 4096


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long, in seconds.

    Attributes:
        beat: between two signs of life.
        silence: without one, until a connection counts as lost.
        settle: after a failure, for the loss of a node to show that may have caused it. More than `silence`.
        stop: for workers to end by themselves once their round is stopped.
        join: for all nodes to come.
    """

    beat: float = 5.0
    silence: float = 30.0
    settle: float = 45.0
    stop: float = 30.0
    join: float = 3600.0


class Line:
    """A connection of JSON lines that tells of life and of silence."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, patience: Patience) -> None:
        self._reader = reader
        self._writer = writer
        self._patience = patience

    async def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message; one to a peer that is gone is lost."""
        with suppress(OSError):
            self._writer.write(json.dumps(message).encode() + b"\n")
            await asyncio.wait_for(self._writer.drain(), self._patience.silence)

    async def receive(self) -> dict[str, Any] | None:
        """The next message, None once the peer is gone or silent."""
        while True:
            try:
                line = await asyncio.wait_for(self._reader.readline(), self._patience.silence)
                message = json.loads(line) if line else None
            except (OSError, ValueError):  # TimeoutError is an OSError; ValueError: no JSON, or a line too long
                return None
            if not isinstance(message, dict):
                return None
            if message:
                return message

    async def beat(self) -> None:
        """Tells that this end lives, until cancelled."""
        while True:
            await asyncio.sleep(self._patience.beat)
            await self.send({})

    def close(self) -> None:
        """Ends the connection."""
        self._writer.close()


@asynccontextmanager
async def living(line: Line) -> AsyncIterator[Line]:
    """Beats while the block runs; closes the line after it."""
    task = asyncio.create_task(line.beat())
    try:
        yield line
    finally:
        task.cancel()
        line.close()


@dataclass(frozen=True)
class _Event:
    """Something a node did: joined (with its line), ended (with its exit status), or left (neither)."""

    node: int
    line: Line
    joined: bool = False
    ended: int | None = None
    round: int = 0
    leaving: bool = False


class Coordinator:
    """The meeting of `num_nodes` nodes. `serve` it, and `run` it to its end."""

    def __init__(self, num_nodes: int, patience: Patience) -> None:
        self._num_nodes = num_nodes
        self._patience = patience
        self._events: asyncio.Queue[_Event] = asyncio.Queue(maxsize=1024)
        self._callers: dict[asyncio.Task[None] | None, Line] = {}
        self._lines: dict[int, Line] = {}
        self._working: set[int] = set()
        self._codes: dict[int, int] = {}
        # Told to end by Kubernetes, and not gone yet.
        self._leaving: set[int] = set()
        self._round = 0
        # When to do without what is waited for: a node, or proof that a failure had its cause elsewhere.
        self._deadline = time.monotonic() + patience.join
        self._failed: tuple[int, int] | None = None

    async def serve(self, host: str, port: int) -> asyncio.Server:
        """Listens to nodes."""
        return await asyncio.start_server(self._attend, host, port, limit=MAX_LINE_BYTES)

    async def run(self) -> None:
        """Holds rounds until one is over for good, and tells all."""
        while True:
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._left()):
                    event = await self._events.get()
            except TimeoutError:
                if await self._give_up():
                    return
                continue
            if await self._take(event):
                return

    async def close(self) -> None:
        """Ends the connections, those that were just told of the end too."""
        callers = dict(self._callers)
        for line in callers.values():
            line.close()
        if tasks := [task for task in callers if task is not None]:
            await asyncio.wait(tasks, timeout=self._patience.stop)

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with living(Line(reader, writer, self._patience)) as line, self._known(line):
            hello = await line.receive()
            node = (hello or {}).get("node")
            if type(node) is not int or not 0 <= node < self._num_nodes:
                logger.warning("something that is no node of this job has called")
                return
            await self._events.put(_Event(node, line, joined=True))
            while (message := await line.receive()) is not None:
                code, number = message.get("ended"), message.get("round")
                if type(code) is int and type(number) is int:
                    leaving = bool(message.get("leaving"))
                    await self._events.put(_Event(node, line, ended=code, round=number, leaving=leaving))
            await self._events.put(_Event(node, line))

    @asynccontextmanager
    async def _known(self, line: Line) -> AsyncIterator[None]:
        task = asyncio.current_task()
        self._callers[task] = line
        try:
            yield
        finally:
            del self._callers[task]

    async def _take(self, event: _Event) -> bool:
        """Whether the meeting is over."""
        if event.joined:
            if (before := self._lines.pop(event.node, None)) is not None:
                before.close()  # its pod was replaced before its silence was noticed
                self._leaving.discard(event.node)
                await self._lose(event.node)
            self._lines[event.node] = event.line
            missing = sorted(set(range(self._num_nodes)) - self._lines.keys())
            logger.info("node %d is here; %s", event.node, f"missing: {missing}" if missing else "all are")
        elif self._lines.get(event.node) is not event.line:
            return False
        elif event.ended is None:
            del self._lines[event.node]
            if event.node in self._leaving:
                self._leaving.discard(event.node)
            else:
                await self._lose(event.node)
        elif event.round == self._round:
            self._working.discard(event.node)
            self._codes[event.node] = event.ended
            if event.leaving:
                self._leaving.add(event.node)
            if event.ended not in (0, EXIT_STOPPED) and self._failed is None:
                self._failed = (event.node, event.ended)
                self._deadline = time.monotonic() + self._patience.settle
            elif event.ended == EXIT_STOPPED and self._failed is None:
                # The others end too: their workers agree on when to stop.
                self._deadline = time.monotonic() + self._patience.settle
        return await self._go_on()

    async def _lose(self, node: int) -> None:
        """A node is gone: what the others do is in vain."""
        self._working.discard(node)
        self._codes[node] = EXIT_STOPPED
        self._failed = None
        self._deadline = time.monotonic() + self._patience.join
        await self._stop(f"node {node} is gone; a new round begins when all nodes are there")

    async def _stop(self, why: str) -> None:
        if self._working:
            logger.warning("round %d is stopped: %s", self._round, why)
            await self._tell({"stop": self._round, "why": why}, self._working)

    async def _go_on(self) -> bool:
        if self._working or self._failed is not None:
            return False
        self._deadline = time.monotonic() + self._patience.join
        if self._round and len(self._codes) == self._num_nodes and not any(self._codes.values()):
            return await self._end(0, "")
        if len(self._lines) == self._num_nodes and not self._leaving:
            self._round += 1
            self._codes = {}
            self._working = set(self._lines)
            self._deadline = float("inf")
            logger.info("round %d begins on %d nodes", self._round, self._num_nodes)
            await self._tell({"begin": self._round}, self._lines)
        return False

    async def _give_up(self) -> bool:
        """The deadline has come. Whether the meeting is over."""
        if self._failed is not None:
            node, code = self._failed
            return await self._end(code, f"node {node} failed first, with status {code}", node)
        if self._working:
            self._deadline = float("inf")
            await self._stop("some nodes were told to end, and the others did not follow")
            return False
        missing = sorted(set(range(self._num_nodes)) - self._lines.keys())
        why = f"nodes {missing} of {self._num_nodes} did not come within {self._patience.join:.0f} s"
        return await self._end(1, why, 0)

    async def _end(self, code: int, why: str, node: int = 0) -> bool:
        await self._tell({"over": code, "why": why, "node": node}, self._lines)
        return True

    async def _tell(self, message: Mapping[str, Any], nodes: "set[int] | dict[int, Line]") -> None:
        await asyncio.gather(*(self._lines[node].send(message) for node in nodes if node in self._lines))
