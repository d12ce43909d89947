"""A discovery that a test follows, against our API server and a real one."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from steersman.trainer.discovery.address import ServiceAddress, parse_address
from steersman.trainer.discovery.endpoint_slices import EndpointSliceDiscovery
from steersman.trainer.retry import Backoff

QUICK = Backoff(initial_seconds=0.01, max_seconds=0.02)
# For an answer.
WAIT_SECONDS: Final = 120


class Following:
    """A discovery and the answers that it gave."""

    def __init__(self, discovery: EndpointSliceDiscovery) -> None:
        self.discovery = discovery
        self.answers = discovery.targets()

    async def next(self) -> tuple[str, ...]:
        return await asyncio.wait_for(anext(self.answers), WAIT_SECONDS)

    async def problem(self, text: str) -> None:
        """Returns once the problem holds `text`."""
        async with asyncio.timeout(WAIT_SECONDS):
            while text not in self.discovery.problem:
                await asyncio.sleep(0.005)


@asynccontextmanager
async def following(address: str = "k8s:///policy", **options: Any) -> AsyncIterator[Following]:
    parsed = parse_address(address)
    assert isinstance(parsed, ServiceAddress)
    one = Following(EndpointSliceDiscovery(parsed, backoff=QUICK, **options))
    try:
        yield one
    finally:
        await asyncio.wait_for(one.answers.aclose(), WAIT_SECONDS)
        names = [thread.name for thread in threading.enumerate()]
        assert "steersman-watch-policy" not in names, "the watcher goes on after its end"
