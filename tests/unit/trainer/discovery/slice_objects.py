"""EndpointSlices as the API server sends them."""

from collections.abc import Sequence
from typing import Any


def endpoint(address: str, *, ready: bool = True, terminating: bool = False) -> dict[str, Any]:
    """A pod's endpoint; one that terminates still serves, and is not ready."""
    serving = ready or terminating
    return {
        "addresses": [address],
        "conditions": {"ready": ready and not terminating, "serving": serving, "terminating": terminating},
        "targetRef": {"kind": "Pod", "name": f"pod-{address}", "namespace": "rl"},
    }


def endpoint_slice(
    name: str,
    endpoints: Sequence[dict[str, Any]],
    *,
    ports: Sequence[tuple[str, int]] = (("grpc", 50051),),
    family: str = "IPv4",
    service: str = "policy",
) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "rl", "labels": {"kubernetes.io/service-name": service}},
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": [{"name": port, "port": number, "protocol": "TCP"} for port, number in ports],
    }
