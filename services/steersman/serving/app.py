"""The one bootstrap of every server process.

    settings -> logs -> port check -> metrics endpoint -> engine -> server -> (SIGTERM, SIGINT or a dead engine) -> end

The engine is built before the gRPC server starts: engines fork, and nothing may fork once gRPC runs.
"""

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from steersman.serving import logging as serving_logging
from steersman.serving.metrics import Metrics
from steersman.serving.server import check_credentials, check_port, start_server
from steersman.serving.service import Service
from steersman.serving.settings import ServerSettings, SettingsError
from steersman.wire.errors import SteersmanError

logger = logging.getLogger(__name__)

SettingsT = TypeVar("SettingsT", bound=ServerSettings)
Build = Callable[[SettingsT, Metrics], Awaitable[Service]]

EXIT_FAILED = 1
EXIT_USAGE = 2


def main(name: str, settings_class: type[SettingsT], build: Build[SettingsT], argv: Sequence[str] | None = None) -> int:
    """Loads settings and serves until told to stop. Returns the exit status of the process."""
    try:
        settings = settings_class.load(argv, program=f"python -m steersman.{name}")
    except SettingsError as error:
        sys.stderr.write(f"steersman {name}: bad settings\n{error}\n")
        return EXIT_USAGE
    return run(name, settings, build)


def run(name: str, settings: SettingsT, build: Build[SettingsT]) -> int:
    """Serves until told to stop. Returns 0 after an orderly end, 1 if the start failed or the engine died."""
    serving_logging.configure(name, settings.log_level, settings.log_format)
    try:
        return asyncio.run(_serve(name, settings, build))
    except (SteersmanError, ValueError, OSError) as error:
        logger.error("cannot start: %s", error, exc_info=settings.log_level == "debug")
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_FAILED


async def _serve(name: str, settings: SettingsT, build: Build[SettingsT]) -> int:
    check_port(settings.host, settings.port)
    check_credentials(settings)
    metrics = Metrics(name)
    endpoint = None
    if settings.metrics_port is not None:
        check_port(settings.host, settings.metrics_port, field="metrics_port")
        tls = None if settings.metrics_in_clear else settings.tls
        endpoint = metrics.serve(settings.host, settings.metrics_port, tls)
    try:
        if settings.health_port is not None:
            check_port(settings.host, settings.health_port, field="health_port")
        service = await build(settings, metrics)
        server = await start_server(service, settings, metrics)
        listening = {
            "address": server.address,
            "metrics": endpoint.address if endpoint else "off",
            "health": server.health_address or "off",
        }
        logger.info("ready", extra=listening)
        dead = await _until_stopped(server.engine_dead)
        logger.info("draining", extra={"grace_seconds": settings.grace_seconds})
        await server.stop(0.0 if dead else settings.grace_seconds)
        logger.info("stopped")
        return EXIT_FAILED if dead else 0
    finally:
        if endpoint is not None:
            endpoint.close()


async def _until_stopped(engine_dead: asyncio.Event) -> bool:
    """Waits for SIGTERM, SIGINT or a dead engine. Returns whether the engine died."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    waits = [asyncio.create_task(event.wait()) for event in (stop, engine_dead)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    return engine_dead.is_set()
