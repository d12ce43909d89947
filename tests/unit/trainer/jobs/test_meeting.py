"""The meeting of a job's nodes, against callers that are none and messages that mean nothing."""

import asyncio
import json
from typing import Any

import pytest

from steersman.trainer.jobs.meeting import Coordinator, Patience

SECONDS = 60.0


class Caller:
    """A connection to the meeting that says what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def say(self, *lines: str) -> None:
        self.writer.write("".join(line + "\n" for line in lines).encode())

    async def hear(self) -> dict[str, Any] | None:
        """The next message that is no sign of life; None at the end."""
        async with asyncio.timeout(SECONDS):
            while line := await self.reader.readline():
                if message := json.loads(line):
                    return dict(message)
        return None


@pytest.mark.parametrize("hello", ["nonsense", "[]", "{}x", '{"node": true}', '{"node": 2}', '{"node": -1}'])
async def test_what_is_no_node_is_sent_away(hello: str) -> None:
    coordinator = Coordinator(2, Patience())
    server = await coordinator.serve("127.0.0.1", 0)
    caller = Caller(*await asyncio.open_connection(*server.sockets[0].getsockname()))
    caller.say(hello)
    assert await caller.hear() is None
    caller.writer.close()
    server.close()
    await coordinator.close()


async def test_messages_that_mean_nothing_change_nothing() -> None:
    coordinator = Coordinator(2, Patience())
    server = await coordinator.serve("127.0.0.1", 0)
    meeting = asyncio.create_task(coordinator.run())
    nodes = [Caller(*await asyncio.open_connection(*server.sockets[0].getsockname())) for _ in range(2)]
    for number, node in enumerate(nodes):
        node.say(json.dumps({"node": number}))
    for node in nodes:
        assert await node.hear() == {"begin": 1}
        node.say('{"ended": 0, "round": "one"}', '{"ended": "0", "round": 1}', '{"ended": 1}', '{"else": 1}')
        node.say('{"ended": 1, "round": 0}', '{"ended": 0, "round": 1}')
    for node in nodes:
        assert (await node.hear() or {})["over"] == 0
        node.writer.close()
    async with asyncio.timeout(SECONDS):
        await meeting
    server.close()
    await coordinator.close()
