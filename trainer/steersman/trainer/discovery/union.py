"""Several sources as one."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from steersman.trainer.discovery.address import Address, DnsAddress, ServiceAddress, StaticAddress, parse_address
from steersman.trainer.discovery.dns import DnsDiscovery
from steersman.trainer.discovery.endpoint_slices import EndpointSliceDiscovery
from steersman.trainer.discovery.fallback import WithFallback, dns_of
from steersman.trainer.discovery.ports import Discovery, Targets
from steersman.trainer.discovery.static import StaticDiscovery


def discover(addresses: Sequence[str], *, default_port: int) -> Discovery:
    """The source of all replicas at `addresses`. ValueError as `parse_address`.

    default_port: where they listen if only the name of a Service is known, and not its ports.
    """
    parsed = list(dict.fromkeys(parse_address(address) for address in addresses))
    static = [address.target for address in parsed if isinstance(address, StaticAddress)]
    sources: list[Discovery] = [StaticDiscovery(static)] if static else []
    sources += [_source(address, default_port) for address in parsed if not isinstance(address, StaticAddress)]
    return sources[0] if len(sources) == 1 else UnionDiscovery(sources)


def _source(address: Address, default_port: int) -> Discovery:
    match address:
        case DnsAddress():
            return DnsDiscovery(address)
        case ServiceAddress():
            return WithFallback(EndpointSliceDiscovery(address), dns_of(address, default_port))
        case StaticAddress():
            return StaticDiscovery([address.target])


class UnionDiscovery:
    """The targets of all sources, each once. What one source knows is told before the others have answered."""

    def __init__(self, sources: Sequence[Discovery]) -> None:
        self._sources = sources

    @property
    def name(self) -> str:
        """Those of the sources."""
        return ", ".join(source.name for source in self._sources)

    @property
    def problem(self) -> str:
        """Those of the sources."""
        return "; ".join(source.problem for source in self._sources if source.problem)

    async def targets(self) -> AsyncGenerator[Targets, None]:
        """See `Discovery.targets`."""
        known: dict[int, Targets] = {}
        changed = asyncio.Event()

        async def follow(number: int, source: Discovery) -> None:
            async with aclosing(source.targets()) as answers:
                async for targets in answers:
                    known[number] = targets
                    changed.set()

        tasks = {asyncio.create_task(follow(number, source)) for number, source in enumerate(self._sources)}
        waiter: asyncio.Task[Any] = asyncio.create_task(changed.wait())
        shown: Targets | None = None
        try:
            while tasks or changed.is_set():
                await asyncio.wait({*tasks, waiter}, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in tasks if task.done()]:
                    tasks.remove(task)
                    task.result()
                if not changed.is_set():
                    continue
                changed.clear()
                await waiter
                waiter = asyncio.create_task(changed.wait())
                targets = tuple(sorted({target for answer in known.values() for target in answer}))
                if targets != shown:
                    yield targets
                    shown = targets
        finally:
            for task in (*tasks, waiter):
                task.cancel()
            await asyncio.gather(*tasks, waiter, return_exceptions=True)
