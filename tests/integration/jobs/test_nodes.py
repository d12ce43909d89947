"""Nodes of a job as real processes on one machine: they begin together, lose one, fail, stop and end together."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

PROGRAM = str(Path(__file__).with_name("node_program.py"))
STOPPED = 143


def two_free_ports() -> int:
    """A free port whose next one is free too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port


class Pods:
    """Starts nodes as Kubernetes would, and sees what their workers wrote into the folder."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder = folder
        self.num_nodes = num_nodes
        self._port = two_free_ports()
        self.running: list[asyncio.subprocess.Process] = []

    async def start(self, node: int) -> asyncio.subprocess.Process:
        pod = await asyncio.create_subprocess_exec(
            *(sys.executable, PROGRAM, str(self.num_nodes), str(self._port), str(self.folder)),
            env=dict(os.environ) | {"JOB_COMPLETION_INDEX": str(node)},
            start_new_session=True,
        )
        self.running.append(pod)
        return pod

    async def start_all(self) -> list[asyncio.subprocess.Process]:
        # The first node comes last: the others wait for it.
        return [await self.start(node) for node in reversed(range(self.num_nodes))][::-1]

    async def until(self, *names: str) -> None:
        async with asyncio.timeout(90):
            while not all((self.folder / name).exists() for name in names):
                await asyncio.sleep(0.02)

    def tell(self, name: str, what: str) -> None:
        """What the worker of a node does in a round ("1-0", round and node)."""
        partial = self.folder / f"{name}.partial"
        partial.write_text(what)
        partial.rename(self.folder / f"{name}.do")


@pytest.fixture
async def pods(tmp_path: Path) -> AsyncIterator[Pods]:
    pods = Pods(tmp_path, 3)
    yield pods
    for pod in pods.running:
        with suppress(ProcessLookupError):
            os.killpg(pod.pid, signal.SIGKILL)
        await pod.wait()
    # Workers are in sessions of their own; they end when their folder says so.
    for path in list(tmp_path.glob("*.began")):
        pods.tell(path.stem, "0")


async def codes(running: list[asyncio.subprocess.Process]) -> list[int]:
    async with asyncio.timeout(90):
        return [await pod.wait() for pod in running]


async def test_nodes_end_together(pods: Pods) -> None:
    running = await pods.start_all()
    await pods.until("1-0.began", "1-1.began", "1-2.began")
    for node in range(3):
        pods.tell(f"1-{node}", "0")
    assert await codes(running) == [0, 0, 0]


@pytest.mark.parametrize("lost", [0, 2])
async def test_a_lost_node_begins_the_round_anew_on_all(pods: Pods, lost: int) -> None:
    running = await pods.start_all()
    await pods.until("1-0.began", "1-1.began", "1-2.began")
    running[lost].kill()
    # Its worker goes with its pod; those of the others are told to end, and killed when they do not.
    pods.tell(f"1-{lost}", "0")
    await pods.until(f"1-{lost}.ended", *(f"1-{node}.told" for node in range(3) if node != lost))
    for path in pods.folder.iterdir():
        path.unlink()
    running[lost] = await pods.start(lost)
    # A new first node counts from one again.
    again = 2 if lost else 1
    await pods.until(*(f"{again}-{node}.began" for node in range(3)))
    for node in range(3):
        pods.tell(f"{again}-{node}", "0")
    assert await codes(running) == [0, 0, 0]


async def test_a_failure_ends_all_and_is_told_by_the_node_that_failed(pods: Pods) -> None:
    running = await pods.start_all()
    await pods.until("1-0.began", "1-1.began", "1-2.began")
    pods.tell("1-1", "1")
    assert await codes(running) == [0, 1, 0]


async def test_a_failure_that_follows_a_loss_is_none(pods: Pods) -> None:
    running = await pods.start_all()
    await pods.until("1-0.began", "1-1.began", "1-2.began")
    pods.tell("1-1", "1")
    await pods.until("1-1.ended")
    running[2].kill()
    pods.tell("1-2", "0")
    running[2] = await pods.start(2)
    await pods.until("2-0.began", "2-1.began", "2-2.began")
    for node in range(3):
        pods.tell(f"2-{node}", "0")
    assert await codes(running) == [0, 0, 0]


@pytest.mark.parametrize("status", [STOPPED, 0], ids=["lead", "follower"])
async def test_a_node_that_is_told_to_end_leaves_and_the_others_stay(pods: Pods, status: int) -> None:
    running = await pods.start_all()
    await pods.until("1-0.began", "1-1.began", "1-2.began")
    running[1].terminate()
    await pods.until("1-1.told")
    # Workers agree: all write the checkpoint and end as they were told to.
    pods.tell("1-0", str(STOPPED))
    pods.tell("1-1", str(status))
    pods.tell("1-2", "0")
    assert await codes([running[1]]) == [STOPPED]
    running[1] = await pods.start(1)
    await pods.until("2-0.began", "2-1.began", "2-2.began")
    for node in range(3):
        pods.tell(f"2-{node}", "0")
    assert await codes(running) == [0, 0, 0]
