"""A network of the test's own: each host is a namespace with one address, and a bridge in a namespace joins them.

Nothing is changed outside these namespaces. The hosts know each other's hardware addresses beforehand: a host that is
cut off is then one from which nothing comes back, not one that the kernel knows to be unreachable.
"""

import contextlib
import os
import subprocess
from types import TracebackType
from typing import Self

import pytest

_NETWORK = "10.231.77"
_NEEDS = (
    "needs network namespaces: the commands ip and nsenter (apt-get install iproute2 util-linux), and to be root with "
    "CAP_NET_ADMIN and CAP_SYS_ADMIN (in a container: --privileged)"
)


class Network:
    """Hosts by name. Use as a context manager; skips the test where namespaces are not to be had."""

    def __init__(self, *names: str) -> None:
        self._prefix = f"steersman-{os.getpid()}"
        self._numbers = {name: number for number, name in enumerate(names, start=1)}

    def __enter__(self) -> Self:
        try:
            self._build()
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__(None, None, None)
            said = getattr(error, "stderr", "") or error
            pytest.skip(f"{_NEEDS}: {said}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in ("bridge", *self._numbers):
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _run("ip", "netns", "delete", self._namespace(name))

    def address(self, name: str) -> str:
        """The IP address of a host."""
        return f"{_NETWORK}.{self._numbers[name]}"

    def inside(self, name: str) -> tuple[str, ...]:
        """What to put before a command so that it runs on a host; it is still the process that was started."""
        return ("nsenter", f"--net=/run/netns/{self._namespace(name)}", "--")

    def cut_off(self, name: str) -> None:
        """From now on nothing comes to a host or from it."""
        self._on("bridge", "link", "set", self._port(name), "down")

    def bring_back(self, name: str) -> None:
        """Mends what `cut_off` did."""
        self._on("bridge", "link", "set", self._port(name), "up")

    def _build(self) -> None:
        for name in ("bridge", *self._numbers):
            _run("ip", "netns", "add", self._namespace(name))
            self._on(name, "link", "set", "lo", "up")
        self._on("bridge", "link", "add", "bridge", "type", "bridge")
        self._on("bridge", "link", "set", "bridge", "up")
        for name, number in self._numbers.items():
            end = ("peer", "name", "eth0", "address", _hardware(number), "netns", self._namespace(name))
            self._on("bridge", "link", "add", self._port(name), "type", "veth", *end)
            self._on("bridge", "link", "set", self._port(name), "master", "bridge", "up")
            self._on(name, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            self._on(name, "link", "set", "eth0", "up")
        for name, number in self._numbers.items():
            for other in self._numbers:
                if other != name:
                    at = ("lladdr", _hardware(number), "dev", "eth0", "nud", "permanent")
                    self._on(other, "neigh", "replace", self.address(name), *at)
        _run(*self.inside(next(iter(self._numbers))), "true")

    def _on(self, name: str, *command: str) -> None:
        _run("ip", "-n", self._namespace(name), *command)

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _port(self, name: str) -> str:
        return f"port{self._numbers[name]}"


def _hardware(number: int) -> str:
    return f"02:00:00:00:00:{number:02x}"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
