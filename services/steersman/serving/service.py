"""What a service must offer to be served."""

from collections.abc import Sequence
from typing import Protocol

import grpc


class EngineDead(Exception):
    """The engine will not come back; the server ends so that whoever runs it can start a new one."""


class Service(Protocol):
    """One deployable service: an engine with its handlers, built before the server listens."""

    name: str

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Adds the servicers to a server; returns their full proto names, for health and reflection."""

    async def check_health(self) -> None:
        """Returns when the engine can serve, raises when it cannot. `EngineDead` ends the server."""

    async def drain(self) -> None:
        """Called after health turned NOT_SERVING and before in-flight calls are awaited."""

    async def close(self) -> None:
        """Frees the engine. No call is in flight any more."""
