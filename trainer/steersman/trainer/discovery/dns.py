"""Replicas at the addresses of a DNS name, as a headless Kubernetes Service has one.

Invariants:

- A lookup that fails or hangs changes nothing: the last answer stands until there is another.
- An address is given up only after `absences` answers in a row without it. Name servers that hand out some of many
  records at a time, in turns, would otherwise make replicas come and go.
- At most one lookup is under way, in a thread that nobody has to wait for.
"""

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Final

from steersman.trainer.discovery.address import DnsAddress
from steersman.trainer.discovery.ports import Targets, format_targets
from steersman.trainer.retry import Sleep

_log = logging.getLogger(__name__)

Resolve = Callable[[str, int], Sequence[str]]

# What cluster DNS keeps a record for (CoreDNS: 5 s for names of Services).
INTERVAL_SECONDS: Final = 5.0


def resolve(name: str, port: int) -> list[str]:
    """All IP addresses of a name, by the system's resolver. OSError if it has none, or nobody can say."""
    return [str(info[4][0]) for info in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)]


class DnsDiscovery:
    """Asks again every `interval_seconds`; a lookup that takes longer than `deadline_seconds` counts as failed."""

    def __init__(
        self,
        address: DnsAddress,
        *,
        resolve: Resolve = resolve,
        interval_seconds: float = INTERVAL_SECONDS,
        deadline_seconds: float = 10.0,
        absences: int = 3,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._address = address
        self._resolve = resolve
        self._interval_seconds = interval_seconds
        self._deadline_seconds = deadline_seconds
        self._absences = absences
        self._sleep = sleep
        self._lookup: asyncio.Future[Sequence[str]] | None = None
        self.problem = ""

    @property
    def name(self) -> str:
        """The address as in the settings."""
        return str(self._address)

    async def targets(self) -> AsyncGenerator[Targets, None]:
        """See `Discovery.targets`."""
        num_absent: dict[str, int] = {}
        shown: Targets | None = None
        try:
            while True:
                if (found := await self._look()) is not None:
                    absent = {host: count + 1 for host, count in num_absent.items() if count + 1 < self._absences}
                    num_absent = absent | dict.fromkeys(found, 0)
                    targets = format_targets((host, self._address.port) for host in num_absent)
                    if targets != shown:
                        yield targets
                        shown = targets
                await self._sleep(self._interval_seconds)
        finally:
            if self._lookup is not None:
                self._lookup.cancel()
                self._lookup = None

    async def _look(self) -> Sequence[str] | None:
        """The addresses now; None if nobody can say."""
        if self._lookup is None:
            self._lookup = look_up(self._resolve, self._address.name, self._address.port)
        try:
            done, _ = await asyncio.wait({self._lookup}, timeout=self._deadline_seconds)
            if not done:
                # The resolver cannot be interrupted. The next look waits for the same lookup.
                self._fails(f"no answer for {self._deadline_seconds:g} s")
                return None
            lookup, self._lookup = self._lookup, None
            found = lookup.result()
        except OSError as error:
            self._fails(error.strerror or str(error))
            return None
        if self.problem:
            _log.info("%s resolves again", self.name)
            self.problem = ""
        return found

    def _fails(self, why: str) -> None:
        if not self.problem:
            _log.warning("%s does not resolve, the last answer stands: %s", self.name, why)
        self.problem = f"{self.name} does not resolve: {why}"


def look_up(resolve: Resolve, name: str, port: int) -> "asyncio.Future[Sequence[str]]":
    """The addresses of a name, or the OSError. In a daemon thread: a lookup that hangs must hold up neither an executor
    nor the end of the process.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Sequence[str]] = loop.create_future()

    def settle(found: Sequence[str] | None, error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        elif found is not None:
            future.set_result(found)

    def run() -> None:
        found: Sequence[str] | None = None
        failure: Exception | None = None
        try:
            found = resolve(name, port)
        except Exception as error:
            failure = error
        try:
            loop.call_soon_threadsafe(settle, found, failure)
        except RuntimeError:  # the loop has ended: nobody wants to know
            return

    threading.Thread(target=run, name="steersman-lookup", daemon=True).start()
    return future
