"""One pod of a job on several processes: `python -m steersman.trainer.jobs.node --nodes 2 --processes 8 ... RUN_DIR`.

    meet the other nodes -> torchrun -> tell how it ended -> again if a node was lost -> end when all do

torchrun does the rest, with a fixed place for every node (its index in the Job) and no restarts of its own. A pod that
is lost takes its workers along, and the others' come to nothing: this process ends them, keeps its pod, and begins
again with the pod that Kubernetes makes in its place, from the last checkpoint.

SIGTERM goes to the workers, who agree on a step, write a checkpoint there and end, on all nodes.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from steersman.cluster.objects import ENV_NODES, ENV_SPEC, EXIT_STOPPED
from steersman.serving import logging as serving_logging
from steersman.trainer.jobs import standalone
from steersman.trainer.jobs.launcher import ENV_PROCESS
from steersman.trainer.jobs.meeting import MAX_LINE_BYTES, Coordinator, Line, Patience, living
from steersman.wire.errors import SteersmanError

logger = logging.getLogger(__name__)

ENV_INDEX: Final = "JOB_COMPLETION_INDEX"
WORKER: Final = ("-m", "steersman.trainer.jobs.worker")
RETRY_SECONDS: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this node is among the others.

    Attributes:
        coordinator: name or address of node 0.
        port: that node 0 listens at; the next one is torchrun's.
        grace: seconds that workers have to end once they are told to.
    """

    node: int
    num_nodes: int
    num_processes: int
    coordinator: str
    port: int
    grace: float


class Node:
    """Runs rounds of `command` until the meeting is over."""

    def __init__(self, place: Place, command: Sequence[str], patience: Patience) -> None:
        self.place = place
        self._command = tuple(command)
        self.patience = patience
        self._told_to_end = asyncio.Event()

    def end(self) -> None:
        """This pod is to end."""
        self._told_to_end.set()

    @property
    def told_to_end(self) -> bool:
        """Whether it is."""
        return self._told_to_end.is_set()

    async def run(self) -> int:
        """The exit status of this pod."""
        if self.place.num_nodes == 1:
            return await self._work(None)
        deadline = time.monotonic() + self.patience.join
        while not self._told_to_end.is_set():
            try:
                connection = asyncio.open_connection(self.place.coordinator, self.place.port, limit=MAX_LINE_BYTES)
                reader, writer = await asyncio.wait_for(connection, self.patience.silence)
            except OSError as error:  # of names that do not resolve yet, and of time, too
                if time.monotonic() > deadline:
                    logger.error("node 0 (%s) cannot be reached: %s", self.place.coordinator, error)
                    return 1
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._told_to_end.wait(), RETRY_SECONDS)
                continue
            async with living(Line(reader, writer, self.patience)) as line:
                code = await self._take_part(line)
            if code is not None:
                return code
            logger.warning("node 0 is gone; waiting for its successor")
            deadline = time.monotonic() + self.patience.join
        return EXIT_STOPPED

    async def _take_part(self, line: Line) -> int | None:
        """Rounds, as the coordinator tells. The exit status, None if the coordinator is gone."""
        await line.send({"node": self.place.node})
        ending = asyncio.create_task(self._told_to_end.wait())
        heard = asyncio.create_task(line.receive())
        work: asyncio.Task[int] | None = None
        number = 0
        try:
            while True:
                if work is None and ending.done():
                    return await self._leave(heard)
                await asyncio.wait({heard, work or ending}, return_when=asyncio.FIRST_COMPLETED)
                if work is None and not heard.done():
                    continue
                if work is not None and work.done():
                    code, work = work.result(), None
                    await line.send({"ended": code, "round": number, "leaving": ending.done()})
                    if ending.done() and code != 0:
                        return code
                    continue
                what = heard.result()
                if what is not None and "begin" in what:
                    number = int(what["begin"])
                    work = asyncio.create_task(self._work(number))
                else:
                    if work is not None:
                        logger.warning("ending the workers: %s", (what or {}).get("why", "node 0 is gone"))
                        await _cancel(work)
                        work = None
                    if what is None:
                        return None
                    if "over" in what:
                        return self._over(what)
                    await line.send({"ended": EXIT_STOPPED, "round": number})
                heard = asyncio.create_task(line.receive())
        finally:
            for task in (ending, heard, work):
                if task is not None:
                    await _cancel(task)

    async def _leave(self, heard: "asyncio.Task[dict[str, Any] | None]") -> int:
        """This pod is to end, and its workers have. Had they nothing left to do, all may have ended well."""
        await asyncio.wait({heard}, timeout=self.patience.beat)
        what = heard.result() if heard.done() else None
        return self._over(what) if what is not None and "over" in what else EXIT_STOPPED

    def _environment(self) -> dict[str, str]:
        # When one worker ends torchrun ends the others of its node, which may still write their part of a checkpoint.
        return {
            ENV_NODES: str(self.place.num_nodes),
            ENV_PROCESS: str(os.getpid()),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(self.place.grace)),
        }

    def _over(self, what: dict[str, Any]) -> int:
        code = int(what["over"])
        if code == 0:
            return 0
        logger.error("the job ends: %s", what.get("why", ""))
        # The pod that failed says so to Kubernetes; the others have nothing more to do.
        return code if int(what.get("node", 0)) == self.place.node else 0

    async def _work(self, number: int | None) -> int:
        """One run of the command. Its exit status; cancelled, it ends the command first."""
        child = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            env=dict(os.environ) | self._environment(),
        )
        logger.info("workers start", extra={"round": number or 1, "torchrun": child.pid})
        done = asyncio.create_task(child.wait())
        ending = asyncio.create_task(self._told_to_end.wait())
        try:
            await asyncio.wait({done, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                logger.info("told to end; the workers write a checkpoint")
                _ask_workers(child.pid)
                with suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(done), self.place.grace)
            if not done.done():
                logger.error("the workers did not end within %.0f s", self.place.grace)
                return EXIT_STOPPED
            code = done.result()
            return code if code >= 0 else 128 - code
        except asyncio.CancelledError:
            _ask_workers(child.pid)
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(done), self.patience.stop)
            raise
        finally:
            ending.cancel()
            _kill_all()
            await done


async def _cancel(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def _kill_all() -> None:
    """Ends all that this process started. Workers are in sessions of their own, and would go on without torchrun; in a
    pod those that lost it are this process's too.
    """
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _ask_workers(torchrun: int) -> None:
    """Tells the workers to end. torchrun itself would kill them after a grace of its own, and forget why they ended."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(torchrun)
        for process in parent.children() or [parent]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)


def torchrun_command(place: Place, run_directory: str) -> list[str]:
    """The command of a round."""
    return [
        *(sys.executable, "-P", "-m", "steersman.trainer.jobs.torchrun"),
        *("--nnodes", str(place.num_nodes)),
        *("--nproc-per-node", str(place.num_processes)),
        *("--node-rank", str(place.node)),
        *("--master-addr", place.coordinator),
        *("--master-port", str(place.port + 1)),
        *("--max-restarts", "0"),
        *WORKER,
        run_directory,
    ]


async def run_node(node: Node, *, host: str = "0.0.0.0") -> int:
    """Runs a node, and the meeting too if it is the first. Returns the exit status of the pod."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, node.end)
    if node.place.num_nodes == 1 or node.place.node != 0:
        return await node.run()
    coordinator = Coordinator(node.place.num_nodes, node.patience)
    server = await coordinator.serve(host, node.place.port)
    meeting = asyncio.create_task(coordinator.run())
    try:
        code = await node.run()
        if not node.told_to_end:
            # The others hear that it is over before this pod is gone.
            with suppress(TimeoutError):
                await asyncio.wait_for(meeting, node.patience.stop)
        return code
    finally:
        await _cancel(meeting)
        server.close()
        await coordinator.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs this node of a job to its end. Returns the exit status of the pod."""
    parser = argparse.ArgumentParser(prog="python -m steersman.trainer.jobs.node")
    parser.add_argument("--nodes", type=int, required=True, help="nodes of the job")
    parser.add_argument("--processes", type=int, required=True, help="processes on each")
    parser.add_argument("--coordinator", required=True, help="name or address of node 0")
    parser.add_argument("--port", type=int, required=True, help="that node 0 listens at; the next one is torchrun's")
    parser.add_argument("--grace", type=float, default=115.0, help="seconds for workers to end once they are told to")
    parser.add_argument("--join", type=float, default=3600.0, help="seconds for all nodes to come")
    parser.add_argument("run_directory")
    arguments = parser.parse_args(argv)
    serving_logging.configure("node", os.environ.get("STEERSMAN_LOG_LEVEL", "info"), "text")
    place = Place(
        node=int(os.environ.get(ENV_INDEX, "0")),
        num_nodes=arguments.nodes,
        num_processes=arguments.processes,
        coordinator=arguments.coordinator,
        port=arguments.port,
        grace=arguments.grace,
    )
    # Once, before any rank of any node looks for it.
    if (spec := os.environ.get(ENV_SPEC)) and place.node == 0:
        try:
            if not standalone.prepare(Path(arguments.run_directory), Path(spec)):
                return 0
        except (OSError, ValueError, SteersmanError) as error:
            logger.error("cannot use the run folder: %s", error)
            return 1
    command = torchrun_command(place, str(Path(arguments.run_directory)))
    return asyncio.run(run_node(Node(place, command, Patience(join=arguments.join))))


if __name__ == "__main__":
    sys.exit(main())
