"""A grpc.aio server with health, reflection and the interceptor, and its orderly end.

Order of an end: health turns NOT_SERVING, the service drains, in-flight calls finish within the grace period, the
rest are cancelled, the engine is freed. The listener for probes ends last.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from steersman.serving.interceptor import CallInterceptor
from steersman.serving.metrics import Metrics
from steersman.serving.probe import ProbeListener, start_probe_listener
from steersman.serving.security.access import AccessList
from steersman.serving.security.gate import Gate
from steersman.serving.security.tls import ServerCertificates
from steersman.serving.service import EngineDead, Service
from steersman.serving.settings import ServerSettings
from steersman.wire.limits import MIB, MIN_KEEPALIVE_SECONDS

logger = logging.getLogger(__name__)

STREAM_WINDOW_BYTES: Final = 8 * MIB
"""8 GB/s on a link with a round trip of a millisecond, 160 MB/s across 50 of them, for each stream."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class PortInUse(OSError):
    """The address to listen on is taken."""


def check_port(host: str, port: int, *, field: str = "port") -> None:
    """Raises `PortInUse` naming the setting if it cannot be listened on; said before a model is loaded for nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise PortInUse(f"{field}: cannot listen on {host}:{port}: {reason}; allowed: a free port, or 0") from None


class Health(HealthServicer):  # type: ignore[misc]
    """`grpc.health.v1` whose watchers hear of every change, and are let go at the end.

    The library's own `Watch` would hold a stopping server for its whole grace period, and its watchers go deaf when
    another one of the same service leaves.
    """

    def __init__(self) -> None:
        super().__init__()
        self._changed = asyncio.Condition()
        self._statuses: dict[str, int] = {}
        self._ending = False

    async def set(self, service: str, status: int) -> None:
        """Sets the status of a service and tells those who watch it."""
        await super().set(service, status)
        async with self._changed:
            self._statuses[service] = status
            self._changed.notify_all()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802
        """Streams the status of a service, now and at every change, until the caller goes or the server ends."""
        told: int | None = None
        while True:
            status = self._statuses.get(request.service, _UNKNOWN)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            elif self._ending:
                return
            async with self._changed:
                while not self._ending and self._statuses.get(request.service, _UNKNOWN) == told:
                    await self._changed.wait()

    async def end_watches(self) -> None:
        """Ends every watch, after what it has still to tell."""
        async with self._changed:
            self._ending = True
            self._changed.notify_all()


class RunningServer:
    """A started server. `stopped` completes when the engine died; `stop` ends the server in order."""

    def __init__(
        self,
        server: grpc.aio.Server,
        service: Service,
        health_servicer: Health,
        names: Sequence[str],
        *,
        address: str,
        health_interval_seconds: float,
        probes: ProbeListener | None = None,
    ) -> None:
        self.address = address
        self.health_address = probes.address if probes is not None else None
        self._probes = probes
        self.engine_dead = asyncio.Event()
        self._server = server
        self._service = service
        self._health = health_servicer
        self._names = ("", *names)
        self._interval = health_interval_seconds
        self._watch = asyncio.create_task(self._watch_engine())

    async def stop(self, grace_seconds: float = 0.0) -> None:
        """NOT_SERVING, drain, wait for in-flight calls at most `grace_seconds`, free the engine."""
        self._watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watch
        await self._tell(_NOT_SERVING)
        try:
            await self._service.drain()
            await self._health.end_watches()
            await self._server.stop(grace_seconds)
        finally:
            await self._service.close()
            if self._probes is not None:
                await self._probes.stop()

    async def _watch_engine(self) -> None:
        serving: bool | None = None
        while not self.engine_dead.is_set():
            healthy = await self._look()
            if healthy != serving:
                serving = healthy
                logger.info("health", extra={"status": "SERVING" if healthy else "NOT_SERVING"})
                await self._tell(_SERVING if healthy else _NOT_SERVING)
            await asyncio.sleep(self._interval)

    async def _tell(self, status: int) -> None:
        for name in self._names:
            await self._health.set(name, status)

    async def _look(self) -> bool:
        try:
            # An engine that does not answer in ten looks' time is not able to serve.
            async with asyncio.timeout(10 * self._interval):
                await self._service.check_health()
        except EngineDead:
            logger.exception("engine died")
            self.engine_dead.set()
            return False
        except Exception:
            logger.warning("engine is not healthy", exc_info=True)
            return False
        return True


def check_credentials(settings: ServerSettings) -> None:
    """Raises ValueError for a file of credentials that cannot be used; said before a model is loaded for nothing."""
    make_gate(settings)
    if settings.tls is not None:
        ServerCertificates(settings.tls)


def make_gate(settings: ServerSettings) -> Gate:
    """The gate of a server. Raises ValueError for an `access_file` that cannot be used."""
    access = AccessList(settings.access_file) if settings.access_file is not None else None
    return Gate(access, settings.max_concurrent_rpcs_per_caller)


async def start_server(service: Service, settings: ServerSettings, metrics: Metrics) -> RunningServer:
    """Starts to listen. The engine behind `service` must be ready. Raises `PortInUse`, or ValueError for a file of
    credentials that cannot be used.
    """
    options = [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        # Two servers on one port would each get some of the calls.
        ("grpc.so_reuseport", 0),
        # How far a sender may run ahead on one stream: a bound on memory that does not depend on who is faster. gRPC's
        # own estimate is left off: while the reader waits for a core it grows to hundreds of MiB.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", STREAM_WINDOW_BYTES),
        # Callers may ping, also while nothing is under way, to notice a dead connection. A little earlier than agreed:
        # pings that queue up on the way arrive closer together.
        ("grpc.http2.min_ping_interval_without_data_ms", round(0.8 * 1000 * MIN_KEEPALIVE_SECONDS)),
        ("grpc.keepalive_permit_without_calls", 1),
        # And the server notices callers that are gone without a word: what they hold (samples under way, a push, their
        # share of the calls) would be held for hours by gRPC's own default. This also bounds how long the kernel sends
        # again what nobody takes (TCP_USER_TIMEOUT).
        ("grpc.keepalive_time_ms", round(1000 * settings.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", round(500 * settings.keepalive_seconds)),
        # Where something on the way acknowledges in the other's stead, this decides, and gRPC's default is a minute.
        ("grpc.http2.ping_timeout_ms", round(500 * settings.keepalive_seconds)),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if settings.max_connection_age_seconds is not None:
        options.append(("grpc.max_connection_age_ms", round(settings.max_connection_age_seconds * 1000)))
    gate = make_gate(settings)
    server = grpc.aio.server(
        interceptors=[CallInterceptor(metrics, gate)],
        options=options,
        maximum_concurrent_rpcs=settings.max_concurrent_rpcs,
    )
    names = service.register(server)
    health_servicer = Health()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    check_port(settings.host, settings.port)
    address = f"{host}:{settings.port}"
    if settings.tls is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, ServerCertificates(settings.tls).credentials())
    probes = None
    if settings.health_port is not None:
        check_port(settings.host, settings.health_port, field="health_port")
        probes = await start_probe_listener(settings.host, settings.health_port, health_servicer)
    await server.start()
    return RunningServer(
        server,
        service,
        health_servicer,
        names,
        address=f"{host}:{port}",
        health_interval_seconds=settings.health_interval_seconds,
        probes=probes,
    )
