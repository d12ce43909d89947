"""Prometheus metrics of one server, on a registry of its own, served on a second port."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.registry import Collector

from steersman.serving.security.tls import TlsSettings

# From a scoring of one short text on a GPU to a long generation on a CPU.
LATENCY_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
COUNT_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TOKEN_BUCKETS: Final = (16, 64, 256, 1024, 4096, 16384, 65536)

PREFIX: Final = "steersman_"


class Metrics:
    """Factories for the metrics of a service, and those that every RPC has."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.registry = CollectorRegistry()
        self.rpc_seconds = self.histogram(
            "rpc_seconds", "Time to answer a call, in seconds.", ("method", "code"), LATENCY_BUCKETS
        )
        self.rpc_in_flight = self.gauge("rpc_in_flight", "Calls being answered.", ("method",))

    def counter(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Counter:
        """A number that only grows. `name` gets the prefix "steersman_" and the suffix "_total"."""
        return Counter(PREFIX + name, help_text, labels, registry=self.registry)

    def gauge(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Gauge:
        """A number that goes up and down. `name` gets the prefix "steersman_"."""
        return Gauge(PREFIX + name, help_text, labels, registry=self.registry)

    def histogram(
        self,
        name: str,
        help_text: str,
        labels: Sequence[str] = (),
        buckets: Sequence[float] = LATENCY_BUCKETS,
    ) -> Histogram:
        """A distribution. `name` gets the prefix "steersman_"."""
        return Histogram(PREFIX + name, help_text, labels, registry=self.registry, buckets=buckets)

    def collect(self, collector: Collector) -> None:
        """Adds a collector that computes its values when it is read."""
        self.registry.register(collector)

    def serve(self, host: str, port: int, tls: TlsSettings | None = None) -> "MetricsEndpoint":
        """Serves the registry over HTTP, or HTTPS with `tls`; port 0 takes a free one. OSError if it is in use."""
        secured: dict[str, Any] = {}
        if tls is not None:
            secured = {"certfile": str(tls.certificate), "keyfile": str(tls.private_key)}
            if tls.client_ca is not None:
                secured |= {"client_cafile": str(tls.client_ca), "client_auth_required": True}
        server, thread = start_http_server(port, addr=host, registry=self.registry, **secured)

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join(timeout=5)

        return MetricsEndpoint(address=f"{host}:{server.server_port}", close=close)


@dataclass(frozen=True, kw_only=True)
class MetricsEndpoint:
    """A running Prometheus endpoint: where it listens, and how to end it."""

    address: str
    close: Callable[[], None]
