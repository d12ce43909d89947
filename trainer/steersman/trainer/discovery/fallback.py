"""The DNS name of a Service, where its EndpointSlices may not be read.

Invariants:

- Slices that were read once are followed for ever: only a refusal before the first answer leads to the name.
- A name that is not known at once leads nowhere: the refusal stands, and is raised.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from steersman.trainer.discovery.address import DnsAddress, ServiceAddress
from steersman.trainer.discovery.dns import DnsDiscovery, Resolve, look_up, resolve
from steersman.trainer.discovery.ports import Discovery, DiscoveryRefused, Targets

_log = logging.getLogger(__name__)

_LOOKUP_SECONDS: Final = 10.0


def dns_of(address: ServiceAddress, default_port: int) -> DnsAddress:
    """The name by which cluster DNS knows a Service, in its own namespace or in another. It does not tell ports: one
    that is not a number is taken to be `default_port`.
    """
    name = address.service if address.namespace is None else f"{address.service}.{address.namespace}.svc"
    return DnsAddress(name, address.port if isinstance(address.port, int) else default_port)


class WithFallback:
    """Follows `primary`; if that is refused, the name. It must be one of a headless Service: another has one address
    for all its pods.
    """

    def __init__(self, primary: Discovery, name: DnsAddress, *, resolve: Resolve = resolve) -> None:
        self._primary = primary
        self._address = name
        self._resolve = resolve
        self._secondary: Discovery | None = None

    @property
    def name(self) -> str:
        """The address as in the settings."""
        return self._primary.name

    @property
    def problem(self) -> str:
        """Of what is followed."""
        return (self._secondary or self._primary).problem

    async def targets(self) -> AsyncGenerator[Targets, None]:
        """See `Discovery.targets`."""
        try:
            async with aclosing(self._primary.targets()) as answers:
                async for targets in answers:
                    yield targets
            return
        except DiscoveryRefused as error:
            refusal = error
        if (why := await self._unknown()) is not None:
            raise DiscoveryRefused(f"{refusal}; nor is there a way by DNS: {self._address}: {why}") from refusal
        _log.warning("%s; going by DNS instead: %s", refusal, self._address)
        self._secondary = DnsDiscovery(self._address, resolve=self._resolve)
        async with aclosing(self._secondary.targets()) as answers:
            async for targets in answers:
                yield targets

    async def _unknown(self) -> str | None:
        """Why the name does not resolve; None if it does."""
        try:
            async with asyncio.timeout(_LOOKUP_SECONDS):
                await look_up(self._resolve, self._address.name, self._address.port)
        except TimeoutError:
            return f"no answer for {_LOOKUP_SECONDS:g} s"
        except OSError as error:
            return error.strerror or str(error)
        return None
