"""A Service whose slices may not be read is found by its name."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest

from steersman.trainer.discovery.address import DnsAddress, parse_address
from steersman.trainer.discovery.fallback import WithFallback, dns_of
from steersman.trainer.discovery.ports import DiscoveryRefused, Targets


class Told:
    """Tells these targets, or refuses."""

    name = "k8s:///policy"
    problem = "slow"

    def __init__(self, *answers: Targets | Exception) -> None:
        self._answers = answers

    async def targets(self) -> AsyncGenerator[Targets, None]:
        for answer in self._answers:
            if isinstance(answer, Exception):
                raise answer
            yield answer


def known(name: str, port: int) -> Sequence[str]:
    return ["10.0.0.2", "10.0.0.1"]


def unknown(name: str, port: int) -> Sequence[str]:
    raise OSError(-2, "Name or service not known")


ADDRESS = DnsAddress("policy", 50051)
REFUSED = DiscoveryRefused("k8s:///policy: 403: the trainer's ServiceAccount needs a Role")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("k8s:///policy", "dns:///policy:50051"),
        ("k8s:///policy:grpc", "dns:///policy:50051"),
        ("k8s:///rl/policy:7", "dns:///policy.rl.svc:7"),
    ],
)
def test_the_name_and_port_of_a_service(text: str, name: str) -> None:
    assert str(dns_of(parse_address(text), 50051)) == name


async def test_a_refusal_leads_to_the_name(caplog: pytest.LogCaptureFixture) -> None:
    one = WithFallback(Told(REFUSED), ADDRESS, resolve=known)
    assert one.problem == "slow"
    async with asyncio.timeout(20), aclosing(one.targets()) as answers:
        assert await anext(answers) == ("10.0.0.1:50051", "10.0.0.2:50051")
    assert one.name == "k8s:///policy"
    assert one.problem == ""
    assert "needs a Role; going by DNS instead: dns:///policy:50051" in caplog.text


async def test_a_refusal_stands_where_the_name_is_unknown() -> None:
    one = WithFallback(Told(REFUSED), ADDRESS, resolve=unknown)
    with pytest.raises(DiscoveryRefused, match=r"needs a Role; nor is there a way by DNS: dns:///policy:50051: Name"):
        await anext(one.targets())


async def test_without_a_refusal_nobody_asks_for_the_name() -> None:
    def never(name: str, port: int) -> Sequence[str]:
        raise AssertionError(name)

    one = WithFallback(Told(("a:1",), ()), ADDRESS, resolve=never)
    assert [targets async for targets in one.targets()] == [("a:1",), ()]
