"""How the machines of a replica notice that one of them is gone.

vLLM's workers take their orders from node 0 and do not notice when it is lost: they would wait for ever, and hold their
accelerators while a new engine wants them. Nor does an idle node 0 notice that workers are lost. So each other node
holds a connection to node 0 that nobody speaks on. When one ends, all nodes end, and whoever runs them starts them
anew.
"""

import socket
import time
from typing import Final

from steersman.policy.engine.options import Nodes
from steersman.policy.engine.port import EngineDeadError

_CONNECT_SECONDS: Final = 10.0
_RESOLVE_SECONDS: Final = 120.0
# A machine that is lost says nothing: after so long without a word the kernel asks, and asks again.
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


def bond_port(nodes: Nodes) -> int:
    """Where node 0 listens for the others; the port before it is torch's."""
    return nodes.port + 1


class Head:
    """Node 0's end. Opened before the others connect."""

    def __init__(self, nodes: Nodes) -> None:
        """Raises OSError if the port is taken, or the address none of this machine."""
        self._ends: dict[socket.socket, str] = {}
        self._listener = _listen(nodes)
        self._listener.setblocking(False)

    def check(self) -> None:
        """Raises `EngineDeadError` if a node that was there is gone."""
        while (accepted := self._accept()) is not None:
            end, host = accepted
            _watch(end)
            self._ends[end] = host
        for end, host in self._ends.items():
            if _has_ended(end):
                raise EngineDeadError(f"the node at {host} is gone")

    def close(self) -> None:
        """Lets go of all nodes: they end."""
        for end in (self._listener, *self._ends):
            end.close()

    def _accept(self) -> tuple[socket.socket, str] | None:
        try:
            end, address = self._listener.accept()
        except BlockingIOError:
            return None
        return end, str(address[0])


class Bond:
    """Another node's end."""

    def __init__(self, nodes: Nodes) -> None:
        """Raises OSError if node 0 is not there."""
        self._address = (nodes.address, bond_port(nodes))
        self._end = socket.create_connection(self._address, _CONNECT_SECONDS)
        _watch(self._end)

    def check(self) -> None:
        """Raises `EngineDeadError` if node 0 is gone."""
        if _has_ended(self._end):
            raise EngineDeadError(f"node 0 at {self._address[0]} is gone")

    def close(self) -> None:
        """Lets go of node 0, which ends."""
        self._end.close()


def _listen(nodes: Nodes) -> socket.socket:
    # A pod's name is known to DNS only some time after its address.
    end = time.monotonic() + _RESOLVE_SECONDS
    while True:
        try:
            return socket.create_server((nodes.address, bond_port(nodes)), backlog=nodes.count)
        except socket.gaierror:
            if time.monotonic() >= end:
                raise
            time.sleep(1.0)


def _watch(end: socket.socket) -> None:
    end.setblocking(False)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _has_ended(end: socket.socket) -> bool:
    try:
        return end.recv(64) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
