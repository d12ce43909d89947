"""The seam between where replicas are and who uses them."""

from collections.abc import AsyncGenerator, Iterable
from ipaddress import ip_address
from typing import Protocol

Targets = tuple[str, ...]
"""All replicas there are now, as `host:port`, each once, in an order that does not depend on who said so."""


class DiscoveryRefused(Exception):
    """Where the replicas are will not be told: no such API, no right to read it, no library. A person must mend it."""


class Discovery(Protocol):
    """A source of targets. What fails for a while is told by `problem`, and changes nothing in the targets."""

    @property
    def name(self) -> str:
        """The address as people wrote it."""
        ...

    @property
    def problem(self) -> str:
        """Why the last look failed; empty if it did not."""
        ...

    def targets(self) -> AsyncGenerator[Targets, None]:
        """The complete targets: once they are known, and then each time that they have changed.

        A consumer that is slow gets the newest only. An empty tuple says that there are none; nothing is said while
        nothing is known. Ends if the targets never change any more. Raises DiscoveryRefused before the first item
        if there is no use in waiting for it. Close the generator to end what runs behind it.
        """
        ...


def format_targets(addresses: Iterable[tuple[str, int]]) -> Targets:
    """Sorted targets from IP addresses (or names) and ports.

    Only one family: a replica with an IPv4 and an IPv6 address is one replica, and nothing says which belong together.
    So the IPv6 addresses count only if there are no others.
    """
    found = set(addresses)
    narrow = {(host, port) for host, port in found if not is_ipv6(host)}
    return tuple(sorted(f"[{host}]:{port}" if is_ipv6(host) else f"{host}:{port}" for host, port in narrow or found))


def is_ipv6(host: str) -> bool:
    """True for an IPv6 address, not for a name."""
    try:
        return ip_address(host).version == 6
    except ValueError:
        return False
