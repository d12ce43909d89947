"""Runs the HTTP application on the event loop of the gRPC server."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from steersman.serving.security.tls import TlsSettings, reloading_context
from steersman.serving.server import PortInUse, check_port

logger = logging.getLogger(__name__)

# Answers are small and quick; a connection that only waits for its next request may stay this long.
_KEEP_ALIVE_SECONDS = 30


class _Embedded(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process, which tells this server when to end."""
        yield


class HttpServer:
    """A started server. `address` is where it listens."""

    def __init__(self, server: uvicorn.Server, listening: socket.socket) -> None:
        host, port = listening.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._server = server
        self._serving = asyncio.create_task(server.serve(sockets=[listening]))

    async def stop(self) -> None:
        """Takes no more connections; calls in flight end within the grace period of `start_http`."""
        self._server.should_exit = True
        await self._serving


async def start_http(
    app: Starlette,
    *,
    host: str,
    port: int,
    max_concurrent_calls: int,
    grace_seconds: float,
    tls: TlsSettings | None = None,
) -> HttpServer:
    """Listens; port 0 takes a free one. Beyond `max_concurrent_calls` callers get 503. Raises `PortInUse`."""
    check_port(host, port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()  # who connects before the server runs waits for it
    except OSError as error:
        listening.close()
        raise PortInUse(f"http_port: cannot listen on {host}:{port}: {error.strerror}") from None
    context = reloading_context(tls) if tls is not None else None
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_context_factory=(lambda *_: context) if context is not None else None,
        lifespan="off",
        limit_concurrency=max_concurrent_calls,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(grace_seconds)),
    )
    server = HttpServer(_Embedded(config), listening)
    logger.info("http front", extra={"address": server.address})
    return server
