"""Small fake services behind real servers. Each fake records what it was asked, and can be told to fail."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from steersman.wire.errors import SteersmanError
from steersman.wire.status import DETAILS_TRAILER, encode_details

Serve = Callable[..., Awaitable[str]]
_CODES = {code.value[0]: code for code in grpc.StatusCode}


async def _refuse(context: Any, error: SteersmanError) -> None:
    trailer = ((DETAILS_TRAILER, encode_details(error)),)
    await context.abort(_CODES[int(error.code)], error.message, trailing_metadata=trailer)


@pytest.fixture
def refuse() -> Callable[[Any, SteersmanError], Awaitable[None]]:
    """Ends a call as a Steersman server would."""
    return _refuse


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """`await serve(add_to_server, servicer)` starts a server and returns its address."""
    servers: list[grpc.aio.Server] = []

    async def start(add: Callable[..., None], servicer: Any, port: int = 0) -> str:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add(servicer, server)
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{bound}"

    yield start
    await asyncio.gather(*(server.stop(None) for server in servers))
