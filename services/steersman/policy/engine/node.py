"""The part of an engine that runs on another machine than its scheduler: workers, and nothing that serves.

vLLM's workers take their orders from node 0 and do not notice when it is gone: they would wait for ever, and hold their
accelerators while a new engine wants them. So a connection to node 0 is held that nobody speaks on; when it ends, so
does this node, and whoever runs it starts it anew, to meet the new engine.
"""

import socket
from typing import Final

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from steersman.policy.engine import orphans
from steersman.policy.engine.config import engine_config
from steersman.policy.engine.options import EngineOptions, Nodes
from steersman.policy.engine.port import EngineDeadError

_CONNECT_SECONDS: Final = 10.0
# A machine that is lost says nothing: after so long without an answer the kernel asks, and asks again.
_IDLE_SECONDS: Final = 10
_INTERVAL_SECONDS: Final = 5
_NUM_PROBES: Final = 3


class Bond:
    """A silent connection to node 0."""

    def __init__(self, nodes: Nodes) -> None:
        """Raises OSError if nobody listens there."""
        self._address = f"{nodes.address}:{nodes.port}"
        self._socket = socket.create_connection((nodes.address, nodes.port), _CONNECT_SECONDS)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            ("TCP_KEEPIDLE", _IDLE_SECONDS),
            ("TCP_KEEPINTVL", _INTERVAL_SECONDS),
            ("TCP_KEEPCNT", _NUM_PROBES),
        ):
            if hasattr(socket, option):
                self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._socket.setblocking(False)

    def check(self) -> None:
        """Raises `EngineDeadError` if the other end is gone."""
        try:
            ended = self._socket.recv(1) == b""
        except BlockingIOError:
            return
        except OSError:
            ended = True
        if ended:
            raise EngineDeadError(f"node 0 at {self._address} is gone")

    def close(self) -> None:
        """Ends it."""
        self._socket.close()


class WorkerNode:
    """The workers of this machine."""

    def __init__(self, executor: MultiprocExecutor, bond: Bond) -> None:
        self._executor = executor
        self._bond = bond

    def check_health(self) -> None:
        """Raises `EngineDeadError` when a worker has died, or node 0."""
        if self._executor.is_failed:
            raise EngineDeadError("a worker process died")
        self._bond.check()

    def shutdown(self) -> None:
        """Ends the workers."""
        self._bond.close()
        self._executor.shutdown()


def start_node(options: EngineOptions) -> WorkerNode:
    """Starts the workers of this machine and waits until they have met node 0 and loaded their share of the model.
    `prepare_environment` comes first. Raises what vLLM raises when they cannot start.
    """
    assert options.nodes is not None
    config = engine_config(options)
    with orphans.forks_end_with_us():
        executor = MultiprocExecutor(config)
    try:
        return WorkerNode(executor, Bond(options.nodes))
    except OSError:
        executor.shutdown()
        raise
