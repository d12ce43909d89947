"""A second listener that answers `grpc.health.v1.Health/Check` and nothing else, in the clear, to everyone.

Probes of Kubernetes speak no TLS and have no credentials, and a server full of calls refuses theirs with the rest. All
that can be learnt here is whether the server serves. There is no `Watch`: strangers could hold it open until no place
is left for a probe.
"""

from typing import Final

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

# A check takes microseconds; more than this at once are no probes.
_MAX_CHECKS: Final = 64
_MAX_MESSAGE_BYTES: Final = 1024


class ProbeListener:
    """A started listener."""

    def __init__(self, server: grpc.aio.Server, address: str) -> None:
        self._server = server
        self.address = address

    async def stop(self) -> None:
        """Ends it at once."""
        await self._server.stop(None)


async def start_probe_listener(host: str, port: int, health: HealthServicer) -> ProbeListener:
    """Answers with what `health` says. The port must be free; 0 takes a free one."""
    server = grpc.aio.server(
        options=[("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)],
        maximum_concurrent_rpcs=_MAX_CHECKS,
    )
    check = grpc.unary_unary_rpc_method_handler(
        health.Check,
        request_deserializer=health_pb2.HealthCheckRequest.FromString,
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    handlers = grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})
    server.add_generic_rpc_handlers((handlers,))
    bracketed = f"[{host}]" if ":" in host else host
    bound = server.add_insecure_port(f"{bracketed}:{port}")
    await server.start()
    return ProbeListener(server, f"{bracketed}:{bound}")
