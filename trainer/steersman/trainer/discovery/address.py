"""What a setting says about where replicas are.

>>> parse_address("10.0.0.7:50051")
StaticAddress(target='10.0.0.7:50051')
>>> parse_address("dns:///policy.rl.svc.cluster.local:50051")
DnsAddress(name='policy.rl.svc.cluster.local', port=50051)
>>> parse_address("k8s:///rl/policy:grpc")
ServiceAddress(service='policy', namespace='rl', port='grpc')
"""

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

FORMS: Final = "host:port, unix:PATH, dns:///NAME:PORT or k8s:///[NAMESPACE/]SERVICE[:PORT]"

# RFC 1123 labels; a Service's name must begin with a letter besides (RFC 1035).
_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SERVICE: Final = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
# RFC 6335, section 5.1: what Kubernetes takes for the name of a port.
_PORT_NAME: Final = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?")
# Names with underscores are no host names, but people's DNS has them.
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9_]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9_.])?")


@dataclass(frozen=True)
class StaticAddress:
    """One replica that stays where it is."""

    target: str


@dataclass(frozen=True)
class DnsAddress:
    """A replica at each address of a name."""

    name: str
    port: int

    def __str__(self) -> str:
        return f"dns:///{self.name}:{self.port}"


@dataclass(frozen=True)
class ServiceAddress:
    """A replica at each ready endpoint of a Kubernetes Service.

    Attributes:
        service: its name.
        namespace: None: that of the pod, or of the kubeconfig's context.
        port: name or number of the port that the pods listen on; None: the only one, or the one named `grpc`.
    """

    service: str
    namespace: str | None = None
    port: str | int | None = None

    def __str__(self) -> str:
        namespace = "" if self.namespace is None else f"{self.namespace}/"
        return f"k8s:///{namespace}{self.service}" + ("" if self.port is None else f":{self.port}")


Address = StaticAddress | DnsAddress | ServiceAddress


def parse_address(text: str) -> Address:
    """The address that `text` means. ValueError with the text, and what is allowed, if it means none."""
    text = text.strip()
    if text.startswith("k8s:"):
        return _service(text)
    if text.startswith("dns:"):
        return _dns(text)
    if "," in text:
        raise _wrong(text, "one replica; give each of several as an item of its own")
    if re.match(r"unix(-abstract)?:.", text):
        return StaticAddress(text)
    if re.match(r"[a-z0-9-]+:(//|[^0-9])", text):
        raise _wrong(text, FORMS)
    host, port = _host_and_port(text, text)
    return StaticAddress(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def _service(text: str) -> ServiceAddress:
    form = "k8s:///[NAMESPACE/]SERVICE[:PORT]"
    if not text.startswith("k8s:///"):
        raise _wrong(text, f"{form}, with three slashes")
    path, colon, port = text.removeprefix("k8s:///").partition(":")
    namespace, slash, service = path.rpartition("/")
    if slash and not _LABEL.fullmatch(namespace):
        raise _wrong(text, f"{form}; the namespace is {namespace!r}, must be small letters, digits and hyphens")
    if not _SERVICE.fullmatch(service):
        raise _wrong(text, f"{form}; the Service is {service!r}, must be a letter, then small letters, digits, hyphens")
    return ServiceAddress(service, namespace if slash else None, _service_port(text, port) if colon else None)


def _service_port(text: str, port: str) -> str | int:
    if port.isdecimal():
        return _port(text, port)
    if not _PORT_NAME.fullmatch(port):
        raise _wrong(
            text, f"a port's number, 1 to 65535, or its name of at most 15 small letters; the port is {port!r}"
        )
    return port


def _dns(text: str) -> DnsAddress:
    if not text.startswith("dns:///"):
        raise _wrong(text, "dns:///NAME:PORT, with three slashes and no name server")
    name, port = _host_and_port(text, text.removeprefix("dns:///"))
    if not _HOST_NAME.fullmatch(name):
        raise _wrong(text, f"dns:///NAME:PORT; the name is {name!r}")
    return DnsAddress(name, port)


def _host_and_port(text: str, part: str) -> tuple[str, int]:
    host, colon, port = part.rpartition(":")
    if not colon or not host:
        raise _wrong(text, FORMS)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise _wrong(text, f"an IPv6 address in brackets; it is {host!r}") from None
    elif not _HOST_NAME.fullmatch(host):
        raise _wrong(text, f"{FORMS}, IPv6 addresses in brackets; the host is {host!r}")
    return host, _port(text, port)


def _port(text: str, port: str) -> int:
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise _wrong(text, f"a port from 1 to 65535; the port is {port!r}")
    return int(port)


def _wrong(text: str, allowed: str) -> ValueError:
    return ValueError(f"address is {text!r}, allowed: {allowed}")
