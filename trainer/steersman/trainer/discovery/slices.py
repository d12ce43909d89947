"""Which endpoints of a Service may be used, from its EndpointSlices (discovery.k8s.io/v1) as the API server sends them.

An endpoint counts if it is ready (a condition that is not said is ready, says the API) and does not terminate: a pod
that drains may still serve what it has, but gets nothing new. Of a Service of two IP families one is used. Several
slices of one Service may show the same endpoint while it moves from one to the other.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from steersman.trainer.discovery.ports import Targets, format_targets

DEFAULT_PORT_NAME: Final = "grpc"
Slice = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Endpoints:
    """What the slices of a Service say.

    Attributes:
        targets: the endpoints to use.
        num_unready: endpoints that are not ready, or terminate.
        problem: why endpoints that are ready are left out (no such port); empty if none is.
    """

    targets: Targets
    num_unready: int = 0
    problem: str = ""


def read_slices(slices: Iterable[Slice], port: str | int | None) -> Endpoints:
    """The usable endpoints of all slices of one Service, on the port with that name or number."""
    addresses: set[tuple[str, int]] = set()
    num_unready, problem = 0, ""
    for one in slices:
        # The API server leaves out empty lists or says null.
        endpoints = one.get("endpoints") or []
        ready = [endpoint for endpoint in endpoints if _usable(endpoint.get("conditions") or {})]
        num_unready += len(endpoints) - len(ready)
        if not ready:
            continue
        try:
            number = _port(one.get("ports") or [], port)
        except ValueError as error:
            problem = f"EndpointSlice {one.get('metadata', {}).get('name', '?')}: {error}"
            continue
        # All addresses of an endpoint are one pod, and clients shall use the first, says the API.
        addresses |= {(endpoint["addresses"][0], number) for endpoint in ready if endpoint.get("addresses")}
    return Endpoints(targets=format_targets(addresses), num_unready=num_unready, problem=problem)


def _usable(conditions: Mapping[str, bool | None]) -> bool:
    return conditions.get("ready") is not False and conditions.get("terminating") is not True


def _port(ports: Iterable[Mapping[str, Any]], wanted: str | int | None) -> int:
    """ValueError naming the ports there are if none of them is the wanted one."""
    tcp = [one for one in ports if one.get("port") and one.get("protocol") in (None, "TCP")]
    if isinstance(wanted, int) and (not tcp or any(one["port"] == wanted for one in tcp)):
        return wanted  # a headless Service need not list ports
    if wanted is None and len(tcp) == 1:
        return int(tcp[0]["port"])
    name = DEFAULT_PORT_NAME if wanted is None else wanted
    for one in tcp:
        if one.get("name") == name:
            return int(one["port"])
    there = ", ".join(f"{one.get('name') or '(unnamed)'}={one['port']}" for one in tcp) or "none"
    hint = "give the name of a port, or the number that the pods listen on"
    raise ValueError(f"port is {wanted if wanted is not None else 'not said'}, the pods' ports are {there}; {hint}")
