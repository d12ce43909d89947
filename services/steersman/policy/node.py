"""The service of a node that computes for another: it answers health, and nothing else."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import grpc

from steersman.policy.engine.port import EngineDeadError
from steersman.serving.service import EngineDead


class Node(Protocol):
    """Workers of an engine."""

    def check_health(self) -> None:
        """Raises `EngineDeadError` when they are of no use any more."""
        ...

    def shutdown(self) -> None:
        """Ends them."""
        ...


class NodeService:
    """Serves as long as its workers and node 0 do."""

    name = "policy"

    def __init__(self, node: Node) -> None:
        self._node = node

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Nothing: prompts and weights come by node 0."""
        return []

    async def check_health(self) -> None:
        """Raises `EngineDead` when there is nothing left to serve."""
        try:
            self._node.check_health()
        except EngineDeadError as error:
            raise EngineDead(str(error)) from error

    async def drain(self) -> None:
        """Nothing: what is under way is node 0's."""

    async def close(self) -> None:
        """Ends the workers."""
        await asyncio.to_thread(self._node.shutdown)
