"""Ranks of a sharded trainer, processes of their own, publish to real weight stores what one process would."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from relay_fleet import Fault, FlippedBit, Node, Zeros, fleet
from sharded_versions import MANIFEST, host_bytes, image, version

PROGRAM = Path(__file__).with_name("rank_program.py")
SECONDS = 240.0
ONCE = MANIFEST.total_bytes


class Rank:
    """A process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def do(self, command: str, argument: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({command: argument}).encode() + b"\n")
        return await self.heard()

    async def heard(self) -> Any:
        assert self.process.stdout is not None
        async with asyncio.timeout(SECONDS):
            line = await self.process.stdout.readline()
        assert line, "the rank ended"
        return json.loads(line)


@asynccontextmanager
async def ranks(num: int, folder: Path, *, topology: str = "direct", rows: int = 1) -> AsyncIterator[list[Rank]]:
    paths = [PROGRAM.parent, *(Path(one) for one in sys.path if one)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    made: list[Rank] = []
    try:
        for rank in range(num):
            arguments = map(str, (PROGRAM, rank, num, folder, topology, rows))
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, stdin=pipe, stdout=pipe, env=environment
            )
            made.append(Rank(process))
        await asyncio.gather(*(rank.heard() for rank in made))
        yield made
    finally:
        for rank in made:
            assert rank.process.stdin is not None
            rank.process.stdin.close()
        try:
            async with asyncio.timeout(SECONDS):
                await asyncio.gather(*(rank.process.wait() for rank in made))
        finally:
            for rank in made:
                if rank.process.returncode is None:
                    rank.process.kill()
                    await rank.process.wait()


async def publish(trainer: Sequence[Rank], step: int) -> tuple[Any, list[Any]]:
    report, *others = await asyncio.gather(*(rank.do("publish", step) for rank in trainer))
    return report, [other["held"] for other in others]


def serves(node: Node, step: int) -> bool:
    """True if engine and store have what one process would have pushed, to the bit."""
    digest = image(step).digest(MANIFEST.tensors)  # type: ignore[arg-type]
    active = node.store.active
    return node.engine.loaded == host_bytes(step) and (active.version, active.digest) == (version(step), digest)


async def test_three_ranks_publish_what_one_process_would(tmp_path: Path) -> None:
    source = Zeros(MANIFEST)
    async with fleet(2, source=source, are_open=False, timeout_s=SECONDS) as nodes, ranks(3, tmp_path) as trainer:
        lead, targets = trainer[0], [node.target for node in nodes]
        await lead.do("targets", targets[:1])
        report, held = await publish(trainer, 0)
        assert (report["failures"], report["bytes"], report["delta_share"]) == ({}, ONCE, 0.0)
        assert [part["embed"] for part in held] == [334 * 700, 333 * 700]
        assert [part["few"] for part in held] == [150_000, 0]
        assert serves(nodes[0], 0)
        # What has changed, from each rank's own part of the version before.
        for step in (1, 2):
            report, _ = await publish(trainer, step)
            assert report["failures"] == {}
            assert report["delta_share"] > 0.99
            assert 0 < report["bytes"] < ONCE / 10
            assert serves(nodes[0], step)
        # One that is new gets everything, one that stayed behind a chain.
        await lead.do("targets", targets)
        await lead.do("ensure", targets[1])
        assert serves(nodes[1], 2)
        await lead.do("targets", targets[1:])
        for step in (3, 4):
            assert (await publish(trainer, step))[0]["failures"] == {}
        assert serves(nodes[1], 4)
        await lead.do("targets", targets)
        nodes[0].engine.events.clear()
        await lead.do("ensure", targets[0])
        assert serves(nodes[0], 4)
        assert nodes[0].engine.events.count("activate") == 2


async def test_copies_of_a_shard_are_pushed_once_and_along_a_relay_that_breaks(tmp_path: Path) -> None:
    faults: dict[int, Fault] = {1: FlippedBit(count=10)}
    async with (
        fleet(4, source=Zeros(MANIFEST), faults=faults, are_open=False, timeout_s=SECONDS) as nodes,
        ranks(4, tmp_path, topology="chain", rows=2) as trainer,
    ):
        await trainer[0].do("targets", [node.target for node in nodes])
        report, held = await publish(trainer, 0)
        assert [part["embed"] for part in held] == [500 * 700, 0, 0]
        assert report["failures"] == {}
        assert all(serves(node, 0) for node in nodes)
        report, _ = await publish(trainer, 1)
        assert report["failures"] == {}
        assert all(serves(node, 1) for node in nodes)


class Counted(Fault):
    """None: `received` is set when two streams have brought a chunk each."""

    async def tap(self, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        number = 0
        async for message in messages:
            number += 1
            self.count += number == 2
            if self.count == 3:
                self.received.set()
            yield message


@pytest.mark.parametrize("killed", [1, 0])
async def test_a_rank_that_is_killed_in_mid_push_leaves_what_served_before(tmp_path: Path, killed: int) -> None:
    async with (
        fleet(1, source=Zeros(MANIFEST), are_open=False, timeout_s=SECONDS) as [node],
        ranks(2, tmp_path) as trainer,
    ):
        await trainer[0].do("targets", [node.target])
        await publish(trainer, 0)
        await trainer[killed].do("hold", 1)
        tap = node.servicer.fault = Counted()
        pushing = [asyncio.create_task(rank.do("publish", 1)) for rank in trainer]
        if killed:
            await pushing[killed]
        assert await (trainer[1].heard() if killed else pushing[0]) == {"holding": True}
        async with asyncio.timeout(SECONDS):
            await tap.received.wait()
        assert node.store.pushing == version(1)
        trainer[killed].process.send_signal(signal.SIGKILL)
        await node.until_free()
        assert serves(node, 0)
        if killed:
            outcome = await pushing[0]
            assert outcome["error"] == "RankLost"
            assert "rank 1 of the trainer is gone" in outcome["message"]
        assert serves(node, 0)
        assert node.store.staged is None
