"""Programs on the hosts of a `Network`. They end with the test, however it ends."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from namespaces import Network

from steersman.cli import tether

WAIT_S = 240.0
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


@asynccontextmanager
async def running(
    network: Network, host: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Python program on a host; killed at the end. What it says beside its output is in `log`."""
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *network.inside(host),
            sys.executable,
            tether.__file__,
            str(os.getpid()),
            sys.executable,
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=file,
            env=os.environ | _ENVIRONMENT | (environment or {}),
            limit=2**20,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def service(
    network: Network, host: str, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[None]:
    """A service, once it says that it is ready."""
    log = folder / f"{host}.log"
    async with running(network, host, [*command, "--log-format", "json"], log, environment) as process:
        async with asyncio.timeout(WAIT_S):
            while '"ready"' not in log.read_text():
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.05)
        yield


class Job:
    """A `job_program`."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self.events: list[dict[str, Any]] = []

    @classmethod
    @asynccontextmanager
    async def on(cls, network: Network, host: str, folder: Path, **given: Any) -> AsyncIterator["Job"]:
        """A job on a host."""
        program = Path(__file__).with_name("job_program.py")
        log = folder / f"{host}.log"
        async with running(network, host, [str(program), json.dumps(given)], log) as process:
            yield cls(process, log)

    async def go_on(self) -> None:
        """After a pause."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        await self._process.stdin.drain()

    async def says(self, event: str, *, step: int | None = None, message: str = "") -> dict[str, Any]:
        """The next event like this; others are passed over, except the end."""
        assert self._process.stdout is not None
        wanted = (event, step, message)
        try:
            async with asyncio.timeout(WAIT_S):
                while line := await self._process.stdout.readline():
                    found = json.loads(line)
                    self.events.append(found)
                    if found["event"] == event and step in (None, found.get("step")) and message in str(found):
                        return found
        except TimeoutError:
            raise AssertionError(f"{wanted} was not said: {self.events[-20:]}, {self._log.read_text()}") from None
        raise AssertionError(f"it ended before {wanted}: {self.events[-20:]}, {self._log.read_text()}")
