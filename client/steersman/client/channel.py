"""How a client reaches a service: targets, credentials, load balancing, retries, keepalive, size limits.

Retries of unary calls live in the channel's service config, so sync and asyncio clients behave alike. Only UNAVAILABLE
is retried, and only for RPCs that are safe to repeat. Server streams are retried by `calls`, until the first message:
tokens that arrived are never asked for again.
"""

import ipaddress
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio

from steersman.wire.errors import invalid_field
from steersman.wire.limits import MAX_MESSAGE_BYTES, MIN_KEEPALIVE_SECONDS

# Repeating these changes nothing at the server. CreateJob, BeginPush, chunk streams and the like are not among them.
_IDEMPOTENT: Final = {
    "steersman.v1.PolicyService": ("GetModel",),
    "steersman.v1.ReferenceService": ("ComputeLogprobs", "GetModel"),
    "steersman.v1.RewardService": ("Score", "ListScorers"),
    "steersman.v1.RewardModelService": ("GetModel", "ListModels"),
    "steersman.v1.TrainerService": ("GetJob", "ListJobs"),
    "steersman.v1.WeightService": ("GetWeightState", "Activate"),
}
# Longest pause between two tries of a call.
MAX_BACKOFF_SECONDS: Final = 5.0
_SCHEMES: Final = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "xds:", "passthrough:", "vsock:")


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """How to prove who is who. The default is TLS with the system's roots and no client certificate.

    Attributes:
        tls: False sends everything in the clear; then no token may be set.
        root_certificates: PEM of the authorities to trust; None: the system's.
        private_key, certificate_chain: PEM of the client's own identity (mutual TLS); both or neither.
        token: sent as `authorization: Bearer TOKEN` with every call. Never shown by `repr`.
        server_name: name expected in the server's certificate, where it differs from the target (an address list).
    """

    tls: bool = True
    root_certificates: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)
    certificate_chain: bytes | None = None
    token: str | None = field(default=None, repr=False)
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            raise ValueError("private_key and certificate_chain belong together: give both or neither")
        if self.token is not None and not self.tls:
            raise ValueError("token is set with tls=False, allowed: a token only over TLS")

    def to_grpc(self) -> grpc.ChannelCredentials | None:
        """The credentials of a channel; None for a channel in the clear."""
        if not self.tls:
            return None
        channel = grpc.ssl_channel_credentials(
            root_certificates=self.root_certificates,
            private_key=self.private_key,
            certificate_chain=self.certificate_chain,
        )
        if self.token is None:
            return channel
        return grpc.composite_channel_credentials(channel, grpc.access_token_call_credentials(self.token))


@dataclass(frozen=True, kw_only=True)
class ChannelSettings:
    """Transport settings; the defaults suit training and serving inside one cluster.

    Attributes:
        max_message_bytes: largest message in either direction.
        retry_attempts: tries of an idempotent call that meets UNAVAILABLE, 1 (no retry) to 5 (gRPC's own limit).
        retry_initial_backoff_seconds: before the second try; doubles each time, with jitter, up to 5 s.
        keepalive_seconds: a peer that is silent for so long during a call is pinged, at least 5. A network that drops
            packets without a word shows by nothing else.
        keepalive_timeout_seconds: and given up when it answers no ping, or takes no byte, for so long.
        max_reconnect_seconds: longest pause between attempts to connect. gRPC's own 120 s would leave a restarted
            server idle for minutes.
    """

    max_message_bytes: int = MAX_MESSAGE_BYTES
    retry_attempts: int = 4
    retry_initial_backoff_seconds: float = 0.2
    keepalive_seconds: float = 20.0
    keepalive_timeout_seconds: float = 10.0
    max_reconnect_seconds: float = 3.0

    def __post_init__(self) -> None:
        if not 1 <= self.retry_attempts <= 5:
            raise ValueError(f"retry_attempts is {self.retry_attempts}, allowed: 1 to 5")
        if self.keepalive_seconds < MIN_KEEPALIVE_SECONDS:
            raise ValueError(
                f"keepalive_seconds is {self.keepalive_seconds}, allowed: at least {MIN_KEEPALIVE_SECONDS:g}; servers "
                "end connections that ping more often"
            )


def service_config(settings: ChannelSettings) -> str:
    """The JSON service config: round robin over all addresses, and retries of idempotent calls on UNAVAILABLE."""
    config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if settings.retry_attempts > 1:
        names = [
            {"service": service, "method": method} for service, methods in _IDEMPOTENT.items() for method in methods
        ]
        policy = {
            "maxAttempts": settings.retry_attempts,
            "initialBackoff": f"{settings.retry_initial_backoff_seconds:.3f}s",
            "maxBackoff": f"{MAX_BACKOFF_SECONDS:.3f}s",
            "backoffMultiplier": 2.0,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
        config["methodConfig"] = [{"name": names, "retryPolicy": policy}]
    return json.dumps(config)


def _resolve(host: str, port: int) -> list[str]:
    """Addresses of a host, IPv4 before IPv6. Raises INVALID_FIELD if it has none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise invalid_field("target", host, f"a host that resolves ({error.strerror})") from None
    addresses = dict.fromkeys(str(info[4][0]) for info in found)
    return sorted(addresses, key=lambda address: ipaddress.ip_address(address).version)


def _split_port(address: str) -> tuple[str, int]:
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise invalid_field("target", address, "host:port with a port from 1 to 65535")
    return host, int(port)


def resolve_target(target: str, resolve: Callable[[str, int], list[str]] = _resolve) -> str:
    """The target as gRPC takes it.

    `host:port` and anything with a scheme (`dns:///`, `ipv4:`, `unix:`, ...) pass through; a `dns:///` name is
    resolved again while the channel lives, so it follows a headless Kubernetes service. A list `a:1,b:2` becomes an
    address list; host names in it are resolved once, here. Raises INVALID_FIELD naming the bad part.

        >>> resolve_target("10.0.0.1:50051,10.0.0.2:50051")
        'ipv4:10.0.0.1:50051,10.0.0.2:50051'
    """
    target = target.strip()
    if target.startswith(_SCHEMES):
        return target
    parts = [_split_port(part.strip()) for part in target.split(",")]
    if len(parts) == 1:
        return target
    addresses: list[tuple[str, int]] = []
    for host, port in parts:
        try:
            choices = [str(ipaddress.ip_address(host))]
        except ValueError:
            choices = resolve(host, port)
        addresses.append((choices[0], port))
    versions = {ipaddress.ip_address(address).version for address, _ in addresses}
    if len(versions) > 1:
        raise invalid_field("target", target, "addresses of one family, all IPv4 or all IPv6")
    if versions == {4}:
        return "ipv4:" + ",".join(f"{address}:{port}" for address, port in addresses)
    return "ipv6:" + ",".join(f"[{address}]:{port}" for address, port in addresses)


def channel_options(settings: ChannelSettings, credentials: Credentials | None) -> list[tuple[str, Any]]:
    """The channel arguments of gRPC core."""
    options: list[tuple[str, Any]] = [
        ("grpc.service_config", service_config(settings)),
        ("grpc.enable_retries", 1),
        # A request larger than this buffer is not retried; gRPC's default of 256 KiB would leave out large batches.
        ("grpc.per_rpc_retry_buffer_size", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.keepalive_time_ms", round(settings.keepalive_seconds * 1000)),
        # The kernel gives up what nobody acknowledges for so long (TCP_USER_TIMEOUT).
        ("grpc.keepalive_timeout_ms", round(settings.keepalive_timeout_seconds * 1000)),
        # Where a proxy on the way acknowledges, the answer to the ping decides, and gRPC would wait a minute for it.
        ("grpc.http2.ping_timeout_ms", round(settings.keepalive_timeout_seconds * 1000)),
        # gRPC's default of two pings would stop the watch over a call that is quiet for long.
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", round(settings.max_reconnect_seconds * 1000)),
        # Clients of one process do not share connections: a weight push must not queue before tokens.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if credentials is not None and credentials.server_name is not None:
        options.append(("grpc.ssl_target_name_override", credentials.server_name))
    return options


def open_aio_channel(target: str, credentials: Credentials | None, settings: ChannelSettings) -> grpc.aio.Channel:
    """An asyncio channel; in the clear if `credentials` is None. Must be called inside the event loop."""
    options = channel_options(settings, credentials)
    secret = credentials.to_grpc() if credentials is not None else None
    if secret is None:
        return grpc.aio.insecure_channel(resolve_target(target), options=options)
    return grpc.aio.secure_channel(resolve_target(target), secret, options=options)


def open_channel(target: str, credentials: Credentials | None, settings: ChannelSettings) -> grpc.Channel:
    """A blocking channel; in the clear if `credentials` is None."""
    options = channel_options(settings, credentials)
    secret = credentials.to_grpc() if credentials is not None else None
    if secret is None:
        return grpc.insecure_channel(resolve_target(target), options=options)
    return grpc.secure_channel(resolve_target(target), secret, options=options)
